# SPDX-License-Identifier: Apache-2.0
"""A model's experts, moved from its modules to pinned memory and back."""

from __future__ import annotations

import torch

from sida._core import ExpertStore, MoeConfig, PinnedLayers
from sida.huggingface.adapter import ExpertAdapter
from sida.huggingface.progress import progress_bar


class PinnedExperts:
    """The experts of a model in pinned memory; while they are there, the modules hold none."""

    def __init__(self, adapter: ExpertAdapter, config: MoeConfig, device: str) -> None:
        """Move all experts, layer by layer; on any error the model is as before.

        Args:
            adapter: The model; its layers' `arrays` are experts as they are computed.
            config: The shape of its experts.
            device: The GPU that they are pinned for.

        Raises:
            MemoryError: So much memory cannot be pinned.
        """
        self._adapter = adapter
        self._pinned = PinnedLayers(config, device)
        self._devices: list[list[torch.device]] = []
        """Of the parameters of each layer that was moved."""
        layers = len(adapter.layer_names)
        self._layer_bytes = config.slab_bytes * config.experts
        try:
            with progress_bar("Pinning experts", self._layer_bytes * layers) as bar:
                for layer in range(layers):
                    self._move(layer)
                    bar.update(self._layer_bytes)
        except BaseException:
            self.restore()
            raise

    @property
    def store(self) -> ExpertStore:
        """The experts."""
        return self._pinned.store

    def restore(self) -> None:
        """Put equal weights back into the modules, each where it was; frees the pinned memory."""
        size = self._layer_bytes * len(self._devices)
        with progress_bar("Giving experts back", size) as bar:
            for layer, devices in enumerate(self._devices):
                self._replace(layer, devices)
                arrays = self._adapter.arrays(layer)
                assert arrays is not None
                self._pinned.give_back(layer, arrays)
                bar.update(self._layer_bytes)
        self._devices = []

    def _move(self, layer: int) -> None:
        arrays = self._adapter.arrays(layer)
        assert arrays is not None
        self._pinned.take(arrays)
        devices = [parameter.weight.device for parameter in self._adapter.parameters(layer)]
        self._devices.append(devices)
        del arrays  # the parameters' memory is to go
        self._replace(layer, [torch.device("meta")] * len(devices))

    def _replace(self, layer: int, devices: list[torch.device]) -> None:
        """Put empty parameters in the place of a layer's, so that theirs can go."""
        for parameter, device in zip(self._adapter.parameters(layer), devices, strict=True):
            weight = parameter.weight
            parameter.replace(torch.empty(weight.shape, dtype=weight.dtype, device=device))
