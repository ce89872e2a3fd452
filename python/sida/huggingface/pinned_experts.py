# SPDX-License-Identifier: Apache-2.0
"""A model's experts, moved from its modules to pinned memory and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sida._core import ExpertStore, MoeConfig, PinnedLayers
from sida.huggingface.adapter import ExpertAdapter, ExpertLinear


@dataclass(frozen=True)
class _Moved:
    linear: ExpertLinear
    device: torch.device


class PinnedExperts:
    """The experts of a model in pinned memory; while they are there, the modules hold none."""

    def __init__(self, adapter: ExpertAdapter, config: MoeConfig, device: str) -> None:
        """Move all experts, layer by layer; on any error the model is as before.

        Args:
            adapter: The model.
            config: The shape of its experts.
            device: The GPU that they are pinned for.

        Raises:
            MemoryError: So much memory cannot be pinned.
        """
        self._pinned = PinnedLayers(config, device)
        self._moved: list[list[tuple[_Moved, _Moved]]] = []
        try:
            for layer in range(len(adapter.layer_names)):
                self._move(adapter.experts(layer))
        except BaseException:
            self.restore()
            raise

    @property
    def store(self) -> ExpertStore:
        """The experts."""
        return self._pinned.store

    def restore(self) -> None:
        """Put equal weights back into the modules, each where it was; frees the pinned memory."""
        for layer, pairs in enumerate(self._moved):
            weights = [(_empty(up), _empty(down)) for up, down in pairs]
            self._pinned.give_back(layer, [(up, down, None, None) for up, down in weights])
            for pair, values in zip(pairs, weights, strict=True):
                for moved, weight in zip(pair, values, strict=True):
                    _put(moved.linear, weight)
        self._moved = []

    def _move(self, pairs: list[tuple[ExpertLinear, ExpertLinear]]) -> None:
        weights = [tuple(one.weight.detach().contiguous() for one in pair) for pair in pairs]
        self._pinned.take([(up, down, None, None) for up, down in weights])
        self._moved.append(
            [(_Moved(up, up.weight.device), _Moved(down, down.weight.device)) for up, down in pairs]
        )
        for pair in pairs:
            for linear in pair:
                _put(linear, torch.empty_like(linear.weight, device="meta"))


def _empty(moved: _Moved) -> Tensor:
    return torch.empty_like(moved.linear.weight, device=moved.device, requires_grad=False)


def _put(linear: ExpertLinear, weight: Tensor) -> None:
    needs_gradient = linear.weight.requires_grad
    linear.module.weight = nn.Parameter(weight.detach(), requires_grad=needs_gradient)
