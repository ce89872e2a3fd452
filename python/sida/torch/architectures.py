# SPDX-License-Identifier: Apache-2.0
"""The predictors' networks: token embeddings in, for every MoE layer expert logits and scales out.

A network sees the tokens of a sentence and nothing of its padding: tokens are moved to the front
before anything is computed, so that results do not depend on where or how far a batch is padded.
`sida::HashPredictor` computes the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION_HEADS = 4
"""Heads of the transformer's attention; its hidden size is a multiple of twice this."""

NORM_EPSILON = 1e-6
ROTARY_BASE = 10000.0


def sparsemax(scores: Tensor, mask: Tensor) -> Tensor:
    """Project each row of `scores` onto the simplex (Martins & Astudillo 2016, algorithm 1).

    Args:
        scores: [..., n].
        mask: Broadcastable to `scores`; entries that are False get no weight. Every row needs one
            that is True.

    Returns:
        Weights [..., n], each row adding up to 1, most of them exactly 0.
    """
    # The threshold is never more than 1 below the row's largest score, so nothing further down
    # can matter: clamping there keeps the sums small.
    scores = scores.masked_fill(~mask, -torch.inf)
    scores = (scores - scores.amax(-1, keepdim=True)).clamp_min(-2)
    ordered = scores.sort(-1, descending=True).values
    sums = ordered.cumsum(-1) - 1
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    support = (rank * ordered > sums).sum(-1, keepdim=True)
    threshold = sums.gather(-1, support - 1) / support
    return (scores - threshold).clamp_min(0)


class Network(nn.Module):
    """What all kinds share: padding is dropped before, heads are applied after `trunk`.

    Args:
        embedding_size: Width D of the token embeddings.
        hidden_size: Width H of the network.
        experts: Experts E of a MoE layer.
        heads: MoE layers that the network predicts.
        scale_factor: Largest weight that a router returns.
    """

    def __init__(
        self,
        embedding_size: int,
        hidden_size: int,
        experts: int,
        heads: int,
        scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.embedding_size, self.hidden_size = embedding_size, hidden_size
        self.experts, self.heads, self.scale_factor = experts, heads, scale_factor
        self.compress = nn.Linear(embedding_size, hidden_size)
        self.routing = nn.Linear(hidden_size, heads * experts)
        self.scale = nn.Linear(hidden_size, heads * experts)

    def trunk(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, S, H] of sentences [B, S, D] whose tokens all stand before their pads.

        `mask` [B, S] is True at least at the first position of each sentence.
        """
        raise NotImplementedError

    def forward(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the routing of every token.

        Args:
            embeddings: Token embeddings [B, S, D], float32.
            mask: [B, S] bool, True for tokens, False for padding anywhere.

        Returns:
            Router logits and scales, each [heads, N, E]: N tokens, those of the first sentence
            first; padding has no row.
        """
        lengths = mask.sum(1)
        if not mask.any():
            empty = embeddings.new_zeros(self.heads, 0, self.experts)
            return empty, empty
        longest = int(lengths.max())
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        tokens = torch.arange(longest, device=mask.device) < lengths[:, None]
        packed = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.shape[-1]))
        packed = packed.masked_fill(~tokens[..., None], 0.0)
        seen = tokens.clone()
        seen[:, 0] = True
        hidden = self.trunk(packed, seen)[tokens]
        logits = self.routing(hidden).view(-1, self.heads, self.experts).transpose(0, 1)
        scales = self.scale(hidden).view(-1, self.heads, self.experts).transpose(0, 1)
        return logits, scales.sigmoid() * self.scale_factor


class LstmNetwork(Network):
    """The paper's predictor (SiDA-MoE §3.4).

    FC + ReLU, two LSTM layers, dot-product self-attention with sparsemax whose queries, keys and
    values all are the LSTM's output, and a residual FC of the compressed embeddings.
    """

    def __init__(
        self,
        embedding_size: int,
        hidden_size: int,
        experts: int,
        heads: int,
        scale_factor: float = 1.0,
    ) -> None:
        super().__init__(embedding_size, hidden_size, experts, heads, scale_factor)
        self.lstm = nn.LSTM(hidden_size, hidden_size, num_layers=2, batch_first=True)
        self.residual = nn.Linear(hidden_size, hidden_size)

    def trunk(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return what the heads read, float32 [B, S, hidden_size]."""
        compressed = F.relu(self.compress(embeddings))
        states, _ = self.lstm(compressed)
        weights = sparsemax(states @ states.transpose(1, 2), self._seen(mask))
        attended: Tensor = weights @ states + self.residual(compressed)
        return attended

    def _seen(self, mask: Tensor) -> Tensor:
        """Return which tokens each token attends to, broadcastable to [B, S, S]."""
        return mask[:, None, :]


class CausalLstmNetwork(LstmNetwork):
    """The paper's predictor for decoders: a token attends to itself and to those before it.

    So what is said of a token stays the same when others follow, and a decoder's next token goes on
    from the states of those before.
    """

    def _seen(self, mask: Tensor) -> Tensor:
        length = mask.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        return mask[:, None, :] & before


class TransformerNetwork(Network):
    """Two pre-norm transformer layers with rotary positions: any length, nearer to the teacher."""

    def __init__(
        self,
        embedding_size: int,
        hidden_size: int,
        experts: int,
        heads: int,
        scale_factor: float = 1.0,
    ) -> None:
        if hidden_size % (2 * ATTENTION_HEADS):
            raise ValueError(
                f"expected hidden_size to be a multiple of {2 * ATTENTION_HEADS}, got {hidden_size}"
            )
        super().__init__(embedding_size, hidden_size, experts, heads, scale_factor)
        self.blocks = nn.ModuleList(_Block(hidden_size) for _ in range(2))
        self.norm = nn.RMSNorm(hidden_size, eps=NORM_EPSILON)

    def trunk(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return what the heads read, float32 [B, S, hidden_size]."""
        hidden: Tensor = self.compress(embeddings)
        cosine, sine = _rotary_angles(hidden.shape[1], hidden.shape[2] // ATTENTION_HEADS)
        cosine, sine = cosine.to(hidden.device), sine.to(hidden.device)
        for block in self.blocks:
            hidden = block(hidden, mask, cosine, sine)
        normed: Tensor = self.norm(hidden)
        return normed


class TokenNetwork(Network):
    """One hidden layer on the token's own embedding: no context, and hardly any cost."""

    def trunk(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return what the heads read, float32 [B, S, hidden_size]."""
        return F.relu(self.compress(embeddings))


class _Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=NORM_EPSILON)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.feed_forward_norm = nn.RMSNorm(hidden_size, eps=NORM_EPSILON)
        self.up = nn.Linear(hidden_size, 2 * hidden_size)
        self.down = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        qkv: Tensor = self.qkv(self.attention_norm(hidden))
        query, key, value = qkv.view(batch, length, 3, ATTENTION_HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        hidden = hidden + self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        fed: Tensor = hidden + self.down(F.relu(self.up(self.feed_forward_norm(hidden))))
        return fed


def _rotary_angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, size / 2] of the rotary angles (Su et al. 2021).

    Worked out in float64: float32 angles are off by 1e-4 after a thousand tokens.
    """
    frequency = ROTARY_BASE ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def _rotate(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn element i of each vector and element i + size / 2 by the angle of their position."""
    first, second = vectors.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


NETWORKS: dict[str, tuple[type[Network], int]] = {
    "lstm": (LstmNetwork, 256),
    "causal_lstm": (CausalLstmNetwork, 256),
    "transformer": (TransformerNetwork, 256),
    "token": (TokenNetwork, 512),
}
"""Class and usual hidden size of each kind."""


def kind_for_decoder(kind: str) -> str:
    """Return the kind that foretells no token from those that follow it.

    Raises:
        ValueError: There is none of the name.
    """
    found = {"lstm": "causal_lstm", "causal_lstm": "causal_lstm", "token": "token"}.get(kind)
    if found is None:
        raise ValueError(f"expected kind lstm or token for a decoder, got {kind!r}")
    return found


def make_network(
    kind: str,
    embedding_size: int,
    experts: int,
    heads: int,
    *,
    hidden_size: int | None = None,
    scale_factor: float = 1.0,
) -> Network:
    """Build the untrained network of a kind.

    Raises:
        ValueError: `kind` is unknown, or a size is not positive.
    """
    if kind not in NETWORKS:
        raise ValueError(f"expected kind to be one of {', '.join(NETWORKS)}; got {kind!r}")
    network, usual = NETWORKS[kind]
    hidden_size = usual if hidden_size is None else hidden_size
    for name, size in {
        "embedding_size": embedding_size,
        "hidden_size": hidden_size,
        "experts": experts,
        "heads": heads,
    }.items():
        if size < 1:
            raise ValueError(f"expected {name} >= 1, got {size}")
    return network(embedding_size, hidden_size, experts, heads, scale_factor)
