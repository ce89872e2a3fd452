# SPDX-License-Identifier: Apache-2.0
"""Where a decoder that follows transformers' experts interface keeps what predictors deal with."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sida.huggingface.adapter import integer_tensor
from sida.huggingface.layers_adapter import LayersAdapter
from sida.huggingface.router_choice import ChoiceForm, LinearRouter

ROUTERS = ("gate", "router")
"""Names that MoE layers have for their router."""
ROUTING_CONFIG = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "norm_topk_prob")
"""What of a config says how tokens are routed, beside the weights."""
NOT_FORETOLD = (
    "sida foretells the routing of models that have one stack with MoE layers, token embeddings "
    "that it looks up, and a router named gate or router in every one of those layers; offload "
    'this model without predictor= and with routing="exact"'
)


class DecoderAdapter(LayersAdapter):
    """The part of an adapter that foretells a decoder's routing: routers beside the experts.

    A token may be foretold only from those before it.
    """

    causal = True
    num_experts: int
    top_k: int

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # By layer, of the router that was there and its class.
        self._choices: dict[int, tuple[nn.Module, type[nn.Module], ChoiceForm | None]] = {}

    def find_predictable(self) -> list[int]:
        """Return the layers whose routing can be foretold: all of them, or none."""
        if len(self.stacks()) != 1 or self._embedding() is None:
            return []
        if not all(isinstance(self._router(i), nn.Module) for i in range(len(self._layers))):
            return []
        return list(range(len(self._layers)))

    def choices(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return what a layer's router chooses; see `ExpertAdapter.choices`."""
        router = self._router(layer)
        if not isinstance(router, nn.Module):
            raise ValueError(f"expected a router named {' or '.join(ROUTERS)}, found none")
        if router.training:
            return None
        form = self._choice_form(layer, router, hidden)
        return form.choose(router, hidden) if form else self._ask(layer, router, hidden)

    def linear_router(self, layer: int, hidden: Tensor) -> LinearRouter | None:
        """Return a layer's router as a kernel asks it; see `ExpertAdapter.linear_router`."""
        router = self._router(layer)
        if not isinstance(router, nn.Module) or router.training:
            return None
        form = self._choice_form(layer, router, hidden)
        return (
            None if form is None else self.keep_linear(layer, router, lambda: form.linear(router))
        )

    def _choice_form(self, layer: int, router: nn.Module, hidden: Tensor) -> ChoiceForm | None:
        known, kind, form = self._choices.get(layer, (None, None, None))
        if known is not router or kind is not type(router):
            form = ChoiceForm.of(router, hidden, lambda rows: self._ask(layer, router, rows))
            self._choices[layer] = router, type(router), form
        return form

    def leave_router_out(self, layer: int) -> None:
        """Let the layer's router choose nothing, since its experts go by the hash table.

        What else the layer computes, as shared experts, goes on. The router returns zeros.
        """
        router, module = self._router(layer), self._layers[layer]
        arguments = _router_arguments(router, module)
        weight = next(router.parameters())
        with torch.no_grad():
            one = weight.new_zeros(1, self._embedding_weight().shape[1])
            shapes = [
                (value.shape[1:], value.dtype)
                for value in type(router).forward(router, one, **arguments)
            ]

        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
            rows = hidden_states.flatten(0, -2).shape[0]
            return tuple(
                hidden_states.new_zeros(rows, *shape, dtype=dtype) for shape, dtype in shapes
            )

        router.forward = forward

    def remove(self, layer: int) -> None:
        """Put the layer's own experts and router back."""
        super().remove(layer)
        router = self._router(layer)
        if isinstance(router, nn.Module):
            router.__dict__.pop("forward", None)

    def stack(self) -> nn.Module:
        """Return the decoder."""
        if not self.predictable:
            raise ValueError(NOT_FORETOLD)
        module: nn.Module = self.stacks()[0].module
        return module

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up the token embeddings."""
        weight = self._embedding_weight()
        return F.embedding(input_ids.to(weight.device), weight.detach())

    def routers(self) -> list[nn.Module]:
        """Return the router of each MoE layer."""
        self.stack()  # says why there are none
        return [self._router(layer) for layer in range(len(self._layers))]

    def routing(self, layer: int, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Read what a router returned: logits, experts and weights."""
        ids = output[integer_tensor(output)]
        weights = output[_weights_place(output)]
        rows = ids.numel() // ids.shape[-1]
        (logits,) = (
            value
            for value in output
            if isinstance(value, Tensor) and value.numel() == rows * self.num_experts
            if value is not weights and value is not ids
        )
        shape = (rows, ids.shape[-1])
        return logits.detach().view(rows, -1).float(), ids.view(shape), weights.detach().view(shape)

    @contextmanager
    def forced_routing(self, tables: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Route by table while the context is open; for models that route exactly."""

        def force(ids: Tensor, weights: Tensor) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
                values, place = list(output), integer_tensor(output)
                own_ids, own_weights = values[place], values[_weights_place(output)]
                if ids.numel() != own_ids.numel():
                    raise ValueError(
                        f"expected routing of {own_ids.numel() // own_ids.shape[-1]} tokens, got "
                        f"{len(ids)}"
                    )
                is_none = ids.to(own_ids.device) < 0
                forced = weights.to(own_weights).masked_fill(is_none, 0)
                values[_weights_place(output)] = forced.view_as(own_weights)
                values[place] = ids.clamp_min(0).to(own_ids).view_as(own_ids)
                return tuple(values)

            return hook

        with ExitStack() as hooks:
            for layer, (ids, weights) in tables.items():
                router = self._router(layer)
                hooks.callback(router.register_forward_hook(force(ids, weights)).remove)
            yield

    def fingerprint(self) -> str:
        """Return the SHA-256 of config, embeddings and routers rounded to bfloat16."""
        config = self.stacks()[0].module.config
        values = {name: getattr(config, name, None) for name in ROUTING_CONFIG}
        digest = hashlib.sha256()
        digest.update(json.dumps([len(self._layers), self.top_k, values]).encode())
        weights = [self._embedding_weight()]
        for router in self.routers():
            weights.extend(router.parameters())
        for weight in weights:
            rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _router(self, layer: int) -> Any:
        parent = self._layers[layer]
        return next((getattr(parent, name) for name in ROUTERS if hasattr(parent, name)), None)

    def _ask(self, layer: int, router: nn.Module, hidden: Tensor) -> Tensor:
        """Return the expert ids that a layer's router returns."""
        # By its class, so that neither its hooks nor what records router logits see the call.
        output = type(router).forward(
            router, hidden, **_router_arguments(router, self._layers[layer])
        )
        ids = output[integer_tensor(output)]
        assert isinstance(ids, Tensor)
        return ids

    def _embedding(self) -> Tensor | None:
        try:
            embedding = self.stacks()[0].module.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        weight = getattr(embedding, "weight", None)
        return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None

    def _embedding_weight(self) -> Tensor:
        self.stack()
        weight = self._embedding()
        assert weight is not None
        return weight


def _router_arguments(router: nn.Module, parent: nn.Module) -> dict[str, Any]:
    """Return what a router takes beside hidden states: its layer's, by the same name."""
    return {name: getattr(parent, name) for name in _further_arguments(type(router).forward)}


@functools.lru_cache(maxsize=64)
def _further_arguments(forward: Callable[..., Any]) -> list[str]:
    """Return the names of what a router's forward asks for beside itself and hidden states."""
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    return [
        p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]


def _weights_place(output: tuple[Any, ...]) -> int:
    """Return the place of the weights among a router's return values: as many as there are ids."""
    ids = output[integer_tensor(output)]
    places = [
        i
        for i, value in enumerate(output)
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == ids.shape
    ]
    if not places:
        raise TypeError(
            f"expected a router that returns as many weights as expert ids, {list(ids.shape)}"
        )
    # The order of most is (logits, weights, ids): with as many choices as experts, the latter two.
    return places[-1]
