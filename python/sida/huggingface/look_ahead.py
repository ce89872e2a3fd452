# SPDX-License-Identifier: Apache-2.0
"""Prediction without training: the next layer's router on this layer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from sida.huggingface.adapter import ExpertAdapter

SWITCHED_OFF = "predictor=False"


class LookAhead:
    """Guesses the experts of a decoder's next MoE layer, while this layer is computed.

    Hidden states change little from layer to layer, so that the next router says nearly the same of
    this layer's input as of its own. A guess only brings experts early: where it cannot be made,
    nothing else changes.

    Attributes:
        off: Why it is not made, one sentence for each reason; empty where nothing stands against
            it.
    """

    def __init__(self, adapter: ExpertAdapter, *, wanted: bool) -> None:
        self._adapter = adapter
        self.off: list[str] = [] if wanted else [SWITCHED_OFF]
        self._layers: set[int] = set()  # from which it is made
        if wanted:
            for stack in adapter.stacks():
                if not stack.predictable:
                    self._layers.update(i for i in stack.layers if i + 1 in stack.layers)

    def choose(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return what the router of the layer behind `layer` chooses.

        Args:
            layer: The MoE layer at hand.
            hidden: Its input, [T, H].

        Returns:
            Expert ids [T, k] int64, or None. In RAM, or, from a GPU, on the way there in the order
            of the current stream.
        """
        if layer not in self._layers:
            return None
        try:
            with torch.no_grad():
                ids = self._adapter.choices(layer + 1, hidden)
                return None if ids is None else _to_ram(ids.view(len(hidden), -1).long())
        except Exception as error:  # the same router raises again where its own layer calls it
            self._layers.discard(layer)
            name = self._adapter.layer_names[layer + 1]
            self.off.append(f"{name}: {type(error).__name__}: {error}")
            return None


def _to_ram(ids: Tensor) -> Tensor:
    if ids.device.type == "cpu":
        return ids.contiguous()
    pinned = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    return pinned.copy_(ids, non_blocking=True)
