# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts encoder of a few lines and its adapter, with no library behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Top-k of a softmax; returns (logits [T, E], ids [T, k], weights [T, k])."""

    def __init__(self, size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, experts, bias=False)
        self.top_k = top_k

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(hidden)
        weights, ids = logits.softmax(-1).topk(self.top_k, -1)
        return logits, ids, weights


class MoeLayer(nn.Module):
    def __init__(self, size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router = Router(size, experts, top_k)
        self.experts = nn.Parameter(torch.randn(experts, size, size) * size**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        _, ids, weights = self.router(flat)
        weights = weights.masked_fill(ids < 0, 0.0)
        outputs = torch.einsum("th,tkhi->tki", flat, self.experts[ids.clamp_min(0)])
        return (outputs * weights[..., None]).sum(1).view_as(hidden)


class TinyMoe(nn.Module):
    """Each layer mixes in the mean of the sentence so far, then routes; [B, S] ids to logits."""

    def __init__(
        self, *, size: int = 16, experts: int = 8, layers: int = 2, top_k: int = 1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, size)
        self.layers = nn.ModuleList(MoeLayer(size, experts, top_k) for _ in range(layers))
        self.head = nn.Linear(size, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2])
        mask = attention_mask[..., None].float()
        for layer in self.layers:
            context = (hidden * mask).cumsum(1) / mask.cumsum(1).clamp_min(1)
            hidden = hidden + self.dropout(layer(hidden + context))
        return self.head((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))


class TinyAdapter:
    def __init__(self, model: TinyMoe, predictable: list[int] | None = None) -> None:
        self.model = model
        self.layer_names = [f"layers.{i}" for i in range(len(model.layers))]
        self.causal = False
        self.predictable = list(range(len(model.layers))) if predictable is None else predictable
        self.num_experts = model.layers[0].router.gate.out_features
        self.top_k = model.layers[0].router.top_k

    def stack(self) -> nn.Module:
        return self.model

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.embedding(input_ids)

    def routers(self) -> list[nn.Module]:
        return [layer.router for layer in self.model.layers]

    def routing(self, layer: int, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        return output

    @contextmanager
    def forced_routing(self, tables: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, (ids, weights) in tables.items():

                def force(
                    module: Any, inputs: Any, output: Any, table: Any = (ids, weights)
                ) -> Any:
                    return output[0], *table

                stack.callback(self.routers()[layer].register_forward_hook(force).remove)
            yield

    def fingerprint(self) -> str:
        weights = [self.model.embedding.weight, *(r.gate.weight for r in self.routers())]
        return hashlib.sha256(b"".join(w.detach().numpy().tobytes() for w in weights)).hexdigest()


def make_tiny(seed: int = 0, **sizes: int) -> TinyAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyAdapter(TinyMoe(**sizes))


def make_batches(
    seed: int = 0, *, count: int = 8, sentences: int = 16, length: int = 12
) -> list[dict[str, Tensor]]:
    """Sentences of 1 to `length` tokens, padded on the right with token 0."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 50, (sentences, length), generator=generator)
        lengths = torch.randint(1, length + 1, (sentences, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches
