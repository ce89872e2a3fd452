# SPDX-License-Identifier: Apache-2.0
"""Fast training of Switch layers: one grouped matrix product for all experts of a layer.

transformers runs the experts in a Python loop with a device synchronisation for each. Here a
layer's experts are stacked for a while; `hugging_face_state` gives the weights back under
transformers' names, so that nothing of this is needed to use the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """An order [T] that brings tokens of one expert together, and where each expert's end [E]."""
    sorted_, order = chosen.sort(stable=True)
    numbers = torch.arange(1, experts + 1, device=chosen.device)
    return order, torch.searchsorted(sorted_, numbers).to(torch.int32)


def grouped_linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each expert's linear map [E, out, in] on its own rows [T, in] of all: [T, out]."""
    # CUDA's grouped product is for bfloat16; elsewhere float32 is as fast and more precise.
    dtype = torch.bfloat16 if rows.is_cuda else weights.dtype
    return F.grouped_mm(rows.to(dtype), weights.to(dtype).transpose(1, 2), offs=ends)


class GroupedExperts(nn.Module):
    """Computes what ``SwitchTransformersExperts`` does, and stands in its place.

    Every token runs through one expert: the capacity of the config must lie above all lengths.
    """

    def __init__(self, experts: nn.ModuleDict, dropout: float = 0.0) -> None:
        super().__init__()
        linears: list[Any] = list(experts.values())
        self.up = nn.Parameter(torch.stack([e.wi.weight.detach() for e in linears]))
        self.down = nn.Parameter(torch.stack([e.wo.weight.detach() for e in linears]))
        self.dropout = dropout

    def forward(self, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """As in transformers: hidden [T, D], selected one-hot [T, 1, experts], weights [T, 1]."""
        order, ends = by_expert(selected.argmax(-1).flatten(), len(self.up))
        rows = grouped_linear(hidden[order], self.up, ends).relu()
        rows = F.dropout(rows, self.dropout, self.training)
        rows = grouped_linear(rows, self.down, ends)
        out = torch.zeros_like(hidden).index_copy(0, order, rows.to(hidden.dtype))
        return out * weights.to(hidden.dtype)


def sparse_mlps(encoder: nn.Module) -> list[Any]:
    """The MoE layers' MLPs of a Switch encoder, in model order."""
    whole: Any = encoder
    return [b.layer[-1].mlp for b in whole.encoder.block if b.layer[-1].is_sparse]


def group_experts(encoder: nn.Module, dropout: float = 0.0) -> None:
    """Replaces the experts of every MoE layer of a Switch encoder in place."""
    for mlp in sparse_mlps(encoder):
        mlp.experts = GroupedExperts(mlp.experts, dropout)


@contextmanager
def grouped_experts(encoder: nn.Module) -> Iterator[None]:
    """Runs an encoder with grouped experts while the context is open."""
    own = [mlp.experts for mlp in sparse_mlps(encoder)]
    group_experts(encoder)
    try:
        yield
    finally:
        for mlp, experts in zip(sparse_mlps(encoder), own, strict=True):
            mlp.experts = experts


def hugging_face_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an encoder with grouped experts under transformers' own names."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.experts)\.(up|down)", name)
        if match:
            linear = {"up": "wi", "down": "wo"}[match[2]]
            for i, expert in enumerate(tensor):
                result[f"{match[1]}.expert_{i}.{linear}.weight"] = expert
        else:
            result[name] = tensor
    return result


def record_logits(encoder: nn.Module) -> list[Tensor]:
    """A list that holds, after every pass, the router logits of each MoE layer."""
    mlps = sparse_mlps(encoder)
    logits = [torch.empty(0)] * len(mlps)

    def keep(layer: int, output: Tensor) -> None:
        logits[layer] = output

    for i, mlp in enumerate(mlps):
        router = mlp.router.classifier
        router.register_forward_hook(lambda _m, _x, output, i=i: keep(i, output))
    return logits


def routing_losses(
    logits: Sequence[Tensor], mask: Tensor, *, top_k: int = 1
) -> tuple[Tensor, Tensor]:
    """Load balancing and z losses of a pass, summed over layers, over tokens of the mask only.

    Both as in the papers: experts x sum(share of uses x mean probability) is 1 when the load is
    even (Fedus et al. 2021, section 2.2); z is the mean squared log of the softmax's denominator
    (Zoph et al. 2022). Each token uses `top_k` experts.
    """
    weights = (mask.float() / mask.sum()).flatten()
    balance = z = torch.zeros((), device=mask.device)
    for layer in logits:
        scores = layer.flatten(0, -2).float()
        probabilities = weights @ scores.softmax(-1)
        used = scores.topk(top_k, -1).indices.flatten()
        shares = torch.zeros_like(probabilities).index_add(
            0, used, weights.repeat_interleave(top_k) / top_k
        )
        balance = balance + scores.shape[-1] * (shares * probabilities).sum()
        z = z + (weights * scores.logsumexp(-1).square()).sum()
    return balance, z
