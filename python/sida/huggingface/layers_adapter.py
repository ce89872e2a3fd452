# SPDX-License-Identifier: Apache-2.0
"""What the adapters of all models share: they put modules in the places of experts, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from sida.huggingface.adapter import Compute, ComputePredicted, Stack
from sida.huggingface.router_choice import LinearRouter
from sida.torch.experts_module import ExpertsModule

NO_PREDICTOR = (
    "sida does not foretell this model's routing; offload it without predictor= and with "
    'routing="exact"'
)


class LayersAdapter(ABC):
    """The part of `sida.huggingface.adapter.ExpertAdapter` that is the same for every model.

    By default nothing is foretold: what predictors ask for raises ValueError.

    Attributes:
        model: The model.
        layer_names: See `ExpertAdapter`.
        predictable: See `ExpertAdapter`.
    """

    looks_for: ClassVar[str]
    causal = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layer_names: list[str] = []
        self.predictable: list[int] = []
        self._layers: list[Any] = []
        self._children: list[str] = []
        self._own_experts: dict[int, nn.Module] = {}
        self._linear: dict[int, LinearRouter] = {}

    def add_layer(self, name: str, layer: nn.Module, child: str) -> None:
        """Note a MoE layer.

        Args:
            name: Its path in the model.
            layer: The module.
            child: Name of its submodule that is the experts.
        """
        self.layer_names.append(name)
        self._layers.append(layer)
        self._children.append(child)

    @abstractmethod
    def stand_in(self, layer: int) -> ExpertsModule:
        """Return a module to put in the place of a layer's experts."""

    def stacks(self) -> list[Stack]:
        """Return the whole model as one stack."""
        return [Stack(self.model, range(len(self._layers)), False)]

    def has_experts(self) -> bool:
        """Whether no handle has taken the experts."""
        return not any(isinstance(self.experts(i), ExpertsModule) for i in range(len(self._layers)))

    def experts(self, layer: int) -> nn.Module:
        """Return the module that is a layer's experts now."""
        module = getattr(self._layers[layer], self._children[layer])
        assert isinstance(module, nn.Module)
        return module

    def own_experts(self, layer: int) -> nn.Module:
        """Return the module that was a layer's experts before `install`."""
        return self._own_experts.get(layer, self.experts(layer))

    def install(
        self, layer: int, compute: Compute, compute_predicted: ComputePredicted | None
    ) -> None:
        """Let `compute` stand in for a layer's experts."""
        if compute_predicted is not None and layer not in self.predictable:
            raise ValueError(NO_PREDICTOR)
        module, experts = self._layers[layer], self.experts(layer)
        if not isinstance(experts, ExpertsModule):
            self._own_experts[layer] = experts
            stand_in = self.stand_in(layer)
            setattr(module, self._children[layer], stand_in.train(experts.training))
            experts = stand_in
        experts.compute, experts.compute_predicted = compute, compute_predicted
        if compute_predicted is not None:
            self.leave_router_out(layer)

    def leave_router_out(self, layer: int) -> None:
        """Let the layer be its experts alone, which take their routing from the hash table."""
        module, experts = self._layers[layer], self.experts(layer)
        assert isinstance(experts, ExpertsModule)

        def forward(hidden_states: Tensor) -> Tensor:
            rows = experts.predicted(hidden_states.flatten(0, -2))
            return rows.view_as(hidden_states)

        module.forward = forward

    def remove(self, layer: int) -> None:
        """Put the layer's own experts and forward back."""
        module, experts = self._layers[layer], self.experts(layer)
        module.__dict__.pop("forward", None)
        if layer in self._own_experts:
            own = self._own_experts.pop(layer).train(experts.training)
            setattr(module, self._children[layer], own)
        elif isinstance(experts, ExpertsModule):
            experts.compute = experts.compute_predicted = None

    def linear_router(self, layer: int, hidden: Tensor) -> LinearRouter | None:
        """Return None: no router is known to be a linear map."""
        return None

    def keep_linear(
        self, layer: int, router: nn.Module, make: Callable[[], LinearRouter]
    ) -> LinearRouter:
        """Return what `make` gave of a layer's router, made anew where its weights are others."""
        known = self._linear.get(layer)
        if known is None or not known.is_of(router):
            known = self._linear[layer] = make()
        return known

    # What predictors ask for.

    def stack(self) -> nn.Module:
        """Raise ValueError: nothing is foretold."""
        raise ValueError(NO_PREDICTOR)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Raise ValueError, as `stack`."""
        raise ValueError(NO_PREDICTOR)

    def routers(self) -> list[nn.Module]:
        """Raise ValueError, as `stack`."""
        raise ValueError(NO_PREDICTOR)

    def routing(self, layer: int, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Raise ValueError, as `stack`."""
        raise ValueError(NO_PREDICTOR)

    @contextmanager
    def forced_routing(self, tables: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Raise ValueError, as `stack`."""
        raise ValueError(NO_PREDICTOR)
        yield

    def fingerprint(self) -> str:
        """Raise ValueError, as `stack`."""
        raise ValueError(NO_PREDICTOR)
