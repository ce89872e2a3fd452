# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer as the model's family has them, read from where they are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sida.huggingface.adapter import ExpertAdapter, ExpertArrays
from sida.huggingface.engine import DTYPES, ExpertSource

if TYPE_CHECKING:
    from sida import MoeConfig


class LayerWeights:
    """See `sida.torch.stand_in.KeptWeights`.

    Attributes:
        device: Where the experts are computed.
    """

    def __init__(
        self,
        adapter: ExpertAdapter,
        source: ExpertSource,
        layer: int,
        device: str,
        turn: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Read nothing yet.

        Args:
            adapter: Of the model.
            source: Where the experts are kept.
            layer: Index of the MoE layer.
            device: Where they are computed.
            turn: Held while an expert is read, so that it is not moved meanwhile.
        """
        self._adapter, self._source, self._layer, self._turn = adapter, source, layer, turn
        self.device = torch.device(device)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self._adapter.num_experts

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self._config.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all experts of the layer."""
        return self.experts * sum(size for _, size in self._config.slab_parts)

    def read(self, expert: int) -> dict[str, Tensor]:
        """Return one expert's weights by their names below the layer's experts.

        Where all experts share a parameter, the expert's part of it is [1, ...].

        Raises:
            RuntimeError: The handle was closed.
            OSError: The file that they are in is damaged.
        """
        with self._turn():
            slab = torch.from_numpy(self._source.store.read(self._layer, expert))
        return self._adapter.as_parameters(expert, _arrays(slab, self._config))

    def outline(self) -> dict[str, Tensor]:
        """Return all experts' weights on the meta device."""
        slab = torch.empty(self._config.slab_bytes, dtype=torch.uint8, device="meta")
        arrays = _arrays(slab, self._config)
        found: dict[str, list[Tensor]] = {}
        for expert in range(self.experts):
            for name, part in self._adapter.as_parameters(expert, arrays).items():
                found.setdefault(name, []).append(part)
        return {name: torch.cat(parts) if parts[1:] else parts[0] for name, parts in found.items()}

    def whole(self) -> dict[str, Tensor]:
        """Return copies of all experts' weights."""
        weights = {
            name: torch.empty_like(weight, device="cpu", memory_format=torch.contiguous_format)
            for name, weight in self.outline().items()
        }
        for expert in range(self.experts):
            for name, part in self.read(expert).items():
                weight = weights[name]
                shared = weight.shape != part.shape
                (weight[expert : expert + 1] if shared else weight).copy_(part)
        return weights

    @property
    def _config(self) -> MoeConfig:
        return self._source.store.config


def _arrays(slab: Tensor, config: MoeConfig) -> ExpertArrays:
    """Return the parts of a slab, uint8 [slab_bytes], as arrays."""
    rows = config.intermediate_size * (2 if config.gated else 1)
    shapes = (
        (rows, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
        (rows,),
        (config.hidden_size,),
    )
    up, down, up_bias, down_bias = (
        slab[begin : begin + size].view(DTYPES[config.dtype]).view(shape) if size else None
        for (begin, size), shape in zip(config.slab_parts, shapes, strict=True)
    )
    assert up is not None and down is not None
    return up, down, up_bias, down_bias
