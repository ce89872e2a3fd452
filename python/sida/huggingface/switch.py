# SPDX-License-Identifier: Apache-2.0
"""Switch Transformers: encoder, encoder-decoder, and with a language-modelling head."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.switch_transformers import modeling_switch_transformers as modeling

from sida.huggingface.adapter import (
    ExpertArrays,
    ExpertParameter,
    Stack,
    integer_tensor,
)
from sida.huggingface.layers_adapter import LayersAdapter
from sida.huggingface.router_choice import LinearRouter
from sida.torch.experts_module import ExpertsModule

if TYPE_CHECKING:
    from sida import MoeConfig

SparseMlp = modeling.SwitchTransformersSparseMLP
ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
ROUTING_CONFIG = [
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "num_sparse_encoder_layers",
    "num_sparse_decoder_layers",
    "num_experts",
    "expert_capacity",
    "router_bias",
    "vocab_size",
    "dense_act_fn",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
]
"""What a model's routing depends on beside its weights."""


class SwitchExperts(ExpertsModule):
    """Takes the place of SwitchTransformersExperts; has no parameters."""

    def forward(
        self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """Compute what the router selected.

        Args:
            hidden_states: [T, H].
            selected_experts: [T, 1, E], 1 at the expert of each token; all 0 where the expert's
                capacity was exceeded.
            routing_weights: [T, 1].
        """
        chosen, ids = selected_experts.max(-1)
        weights = routing_weights.masked_fill(chosen == 0, 0)
        return super().forward(hidden_states, ids, weights)


class SwitchSparseMlp(nn.Module):
    """SwitchTransformersSparseMLP as a checkpoint is loaded into it: its experts are not there."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.router = modeling.SwitchTransformersTop1Router(config)
        self.experts: nn.Module = SwitchExperts(config.num_experts, config.dropout_rate)

    forward = SparseMlp.forward
    """The installed version's own."""


SPARSE_LAYERS = (SparseMlp, SwitchSparseMlp)


class SwitchAdapter(LayersAdapter):
    """See `sida.huggingface.adapter.ExpertAdapter`."""

    interleaved = False
    looks_for = "SwitchTransformersSparseMLP (Switch Transformers)"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether it is a MoE layer of Switch Transformers."""
        return isinstance(module, SPARSE_LAYERS)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._stacks: list[Stack] = []
        for prefix, stack in model.named_modules():
            if not isinstance(stack, modeling.SwitchTransformersStack):
                continue
            first = len(self._layers)
            for name, module in stack.named_modules():
                if isinstance(module, SPARSE_LAYERS):
                    self.add_layer(f"{prefix}.{name}" if prefix else name, module, "experts")
            layers = range(first, len(self._layers))
            self._stacks.append(Stack(stack, layers, not stack.is_decoder))
        if not self._layers:
            raise ValueError(
                "expected the MoE layers within a SwitchTransformersStack, found none there; "
                "pass the model that they belong to"
            )
        self.predictable = [i for s in self._stacks if s.predictable for i in s.layers]
        self.num_experts = int(self._layers[0].router.num_experts)
        self.top_k = 1
        self._logits: dict[int, Tensor] = {}

    # What offloading asks for.

    def stacks(self) -> list[Stack]:
        """Return encoder and decoder, those that have MoE layers."""
        return [stack for stack in self._stacks if stack.layers]

    def config(self, dtype: str) -> MoeConfig:
        """Return the shape of all experts, computed in `dtype`.

        Raises:
            ValueError: sida does not have the experts' activation function.
        """
        from sida import MoeConfig

        config = self._stacks[0].module.config
        activation = ACTIVATIONS.get(config.dense_act_fn)
        if activation is None:
            raise ValueError(
                f"expected dense_act_fn to be one of {', '.join(ACTIVATIONS)}, "
                f"got {config.dense_act_fn!r}"
            )
        return MoeConfig(
            layers=len(self._layers),
            experts=self.num_experts,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            activation=activation,
            dtype=dtype,
        )

    def parameters(self, layer: int) -> list[ExpertParameter]:
        """Return `wi` and `wo` of every expert of a layer.

        Raises:
            ValueError: An expert is not what transformers made it.
        """
        name = self.layer_names[layer]
        owner: Any = self.own_experts(layer)
        found: list[ExpertParameter] = []
        for i in range(self.num_experts):
            expert = owner[f"expert_{i}"]
            for part in ("wi", "wo"):
                linear = getattr(expert, part, None)
                if type(linear) is not nn.Linear or linear.bias is not None:
                    raise ValueError(
                        f"expected {name}.experts.expert_{i}.{part} to be a plain Linear without "
                        f"bias, got {describe_linear(linear)}"
                    )
                key = f"experts.expert_{i}.{part}.weight"
                found.append(ExpertParameter(linear, "weight", key))
        return found

    def arrays(self, layer: int) -> list[ExpertArrays]:
        """Return `wi` and `wo` of every expert of a layer."""
        weights = [found.weight.detach().contiguous() for found in self.parameters(layer)]
        return [
            (up, down, None, None) for up, down in zip(weights[::2], weights[1::2], strict=True)
        ]

    def as_parameters(self, expert: int, arrays: ExpertArrays) -> dict[str, Tensor]:
        """Return `wi` and `wo` of an expert."""
        return {f"expert_{expert}.wi.weight": arrays[0], f"expert_{expert}.wo.weight": arrays[1]}

    def choices(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return what a layer's router chooses; see `ExpertAdapter.choices`."""
        router = self._layers[layer].router
        if router.training:
            return None
        # By its class, so that neither its hooks nor what records router logits see the call.
        selected, _ = _selected(type(router).forward(router, hidden))
        chosen, ids = selected.flatten(0, -2).max(-1)
        return ids.masked_fill(chosen == 0, -1)

    def linear_router(self, layer: int, hidden: Tensor) -> LinearRouter | None:
        """Return a layer's classifier, whatever its capacity leaves out."""
        router = self._layers[layer].router
        if router.training or type(router.classifier) is not nn.Linear:
            return None
        return self.keep_linear(
            layer, router, lambda: LinearRouter.of(router, router.classifier, None, 1)
        )

    def stand_in(self, layer: int) -> SwitchExperts:
        """Return what stands for the experts of every layer."""
        return SwitchExperts(self.num_experts, self._stacks[0].module.config.dropout_rate)

    # What predictors ask for.

    def stack(self) -> nn.Module:
        """Return the encoder."""
        for stack in self._stacks:
            if stack.predictable:
                module: nn.Module = stack.module
                return module
        raise ValueError("the model has no encoder whose routing could be foretold")

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up the encoder's token embeddings; Switch adds no positions to them."""
        embedding = self.stack().get_submodule("embed_tokens")
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        return F.embedding(input_ids.to(weight.device), weight.detach())

    def routers(self) -> list[nn.Module]:
        """Return the router of each MoE layer."""
        # Older versions of transformers keep a router's logits to themselves.
        for layer, mlp in enumerate(self._layers):
            classifier = mlp.router.classifier
            if layer not in self._logits:
                self._logits[layer] = torch.empty(0)
                handle = classifier.register_forward_hook(_keep_logits(weakref.ref(self), layer))
                weakref.finalize(self, handle.remove)
        return [mlp.router for mlp in self._layers]

    def routing(self, layer: int, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Read what a router returned: logits, expert (-1 beyond its capacity) and weight."""
        selected, weights = _selected(output)
        chosen, ids = selected.flatten(0, -2).max(-1, keepdim=True)
        logits = self._logits.get(layer, output[-1])
        return (
            logits.detach().flatten(0, -2).float(),
            ids.masked_fill(chosen == 0, -1),
            weights.detach().reshape(-1, 1),
        )

    @contextmanager
    def forced_routing(self, tables: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Route by table while the context is open; for models that route exactly."""

        def force(ids: Tensor, weights: Tensor) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
                own_selected, own_weights = _selected(output)
                if ids.shape[0] * self.num_experts != own_selected.numel():
                    raise ValueError(
                        f"expected routing of {own_selected.numel() // self.num_experts} tokens, "
                        f"got {ids.shape[0]}"
                    )
                ids_here = ids[:, 0].to(own_selected.device)
                selected = F.one_hot(ids_here.clamp_min(0), self.num_experts)
                selected = selected * (ids_here >= 0)[:, None]
                values = list(output)
                place = integer_tensor(output)
                values[place] = selected.view_as(own_selected)
                values[_weights_place(place)] = weights.to(own_weights).view_as(own_weights)
                return tuple(values)

            return hook

        with ExitStack() as hooks:
            for layer, (ids, weights) in tables.items():
                router = self._layers[layer].router
                hooks.callback(router.register_forward_hook(force(ids, weights)).remove)
            yield

    def fingerprint(self) -> str:
        """Return the SHA-256 of config, embeddings and routers rounded to bfloat16."""
        config = self._stacks[0].module.config
        digest = hashlib.sha256()
        values = {name: getattr(config, name, None) for name in ROUTING_CONFIG}
        digest.update(json.dumps(["switch", self.layer_count(), values]).encode())
        weights = [self._stacks[0].module.embed_tokens.weight]
        for mlp in self._layers:
            weights.extend(mlp.router.classifier.parameters())
        for weight in weights:
            rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def layer_count(self) -> list[int]:
        """Return the number of MoE layers of each stack."""
        return [len(stack.layers) for stack in self._stacks]


def describe_linear(linear: Any) -> str:
    """Say what stands where a plain Linear was expected."""
    if hasattr(linear, "base_layer"):
        return (
            f"{type(linear).__module__}.{type(linear).__name__}: LoRA on experts cannot be "
            "offloaded; merge it first (peft: merge_and_unload()), or train it elsewhere"
        )
    if linear is not None and "bitsandbytes" in type(linear).__module__:
        return f"{type(linear).__name__}: bitsandbytes' quantised layers cannot be offloaded"
    return "nothing" if linear is None else type(linear).__name__


def _weights_place(selected_place: int) -> int:
    # 5.17 returns (probability, selected, probability) and its layer takes the last; later versions
    # (selected, probability, logits).
    return 1 if selected_place == 0 else 2


def _selected(output: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    place = integer_tensor(output)
    return output[place], output[_weights_place(place)]


def _keep_logits(adapter: weakref.ref[SwitchAdapter], layer: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        owner = adapter()
        if owner is not None:
            owner._logits[layer] = output.detach()

    return hook
