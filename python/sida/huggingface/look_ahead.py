# SPDX-License-Identifier: Apache-2.0
"""Prediction without training: the next layer's router on this layer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from sida.huggingface.adapter import ExpertAdapter
from sida.huggingface.router_choice import LinearRouter

SWITCHED_OFF = "predictor=False"
INTEGERS = (torch.int32, torch.int64)
"""What experts are named by."""


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
        self._pinned: Tensor | None = None
        if wanted:
            for stack in adapter.stacks():
                if not stack.predictable:
                    self._layers.update(i for i in stack.layers if i + 1 in stack.layers)

    def is_made(self, layer: int) -> bool:
        """Whether `choose` is of use from a layer."""
        return layer in self._layers

    def router(self, layer: int, hidden: Tensor) -> LinearRouter | None:
        """Return the router of the layer behind `layer`, if a kernel can be asked instead of it.

        Args:
            layer: As for `choose`.
            hidden: As for `choose`, on a GPU.
        """
        try:
            with torch.no_grad():
                router = self._adapter.linear_router(layer + 1, hidden)
        except Exception as error:
            self._switch_off(layer, error)
            return None
        return router if router is not None and router.fits(hidden) else None

    def choose(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return what the router of the layer behind `layer` chooses.

        Args:
            layer: The MoE layer at hand, from which look-ahead is made.
            hidden: Its input, [T, H].

        Returns:
            Expert ids [T, k] int32 or int64, or None. In RAM, or, from a GPU, on the way there in
            the order of the current stream, and there until the next call.
        """
        try:
            if not torch.is_grad_enabled():
                return self._guess(layer + 1, hidden)
            with torch.no_grad():
                return self._guess(layer + 1, hidden)
        except Exception as error:
            self._switch_off(layer, error)
            return None

    def _switch_off(self, layer: int, error: Exception) -> None:
        # The same router raises again where its own layer calls it.
        self._layers.discard(layer)
        name = self._adapter.layer_names[layer + 1]
        self.off.append(f"{name}: {type(error).__name__}: {error}")

    def _guess(self, layer: int, hidden: Tensor) -> Tensor | None:
        ids = self._adapter.choices(layer, hidden)
        if ids is None:
            return None
        if ids.dim() != 2:
            ids = ids.view(len(hidden), -1)
        if ids.dtype not in INTEGERS:
            ids = ids.long()
        return self._to_ram(ids) if ids.is_cuda else ids.contiguous()

    def _to_ram(self, ids: Tensor) -> Tensor:
        # Pinned once: a layer reads its guess before the next one makes one, in the stream's order.
        if (
            self._pinned is None
            or self._pinned.shape != ids.shape
            or self._pinned.dtype != ids.dtype
        ):
            with torch.inference_mode(False):  # to be written to outside inference mode, too
                self._pinned = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        return self._pinned.copy_(ids, non_blocking=True)
