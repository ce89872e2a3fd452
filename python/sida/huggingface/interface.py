# SPDX-License-Identifier: Apache-2.0
"""Every family that follows transformers' experts interface: a stack of all experts in a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sida.huggingface.adapter import ExpertArrays, ExpertParameter, Stack
from sida.huggingface.decoder_adapter import DecoderAdapter
from sida.torch.experts_module import ExpertsModule

if TYPE_CHECKING:
    from sida import MoeConfig

ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""What transformers gives to every class that `use_experts_implementation` decorates."""
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
"""Names that configs have for the number of experts of a token."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
CLAMPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu_clamped": lambda gate, up: F.silu(gate) * up,
    "swiglu_clamped": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * (up + 1),
}
"""Of gate and up, both cut at a limit before."""
LIMITS = ("limit", "swiglu_limit")
"""Attributes in which experts keep that limit."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a layer, the model's own or what stands in for them."""
    return isinstance(module, InterfaceExperts) or all(hasattr(module, a) for a in ATTRIBUTES)


@dataclass(frozen=True)
class ExpertsForm:
    """What the experts of a layer compute, and how their tensors are laid out."""

    experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    limit: float | None
    """What gate and up are cut at, where the activation does."""
    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool

    @classmethod
    def of(cls, experts: Any, where: str) -> ExpertsForm:
        """Read it off a module; its parameters need no memory.

        Args:
            experts: The module.
            where: Its name, for messages.

        Raises:
            ValueError: It has other parameters, or computes something else, than sida knows.
        """
        where = f"{where} ({type(experts).__name__})"
        if getattr(experts, "has_post_expert_norm", False):
            raise ValueError(f"{where}: its experts end in a norm, which sida does not compute")
        gated, biased = bool(experts.has_gate), bool(experts.has_bias)
        expected = set(_names(gated, biased))
        found = {name for name, _ in experts.named_parameters()}
        if found != expected:
            raise ValueError(
                f"{where}: expected the parameters {', '.join(sorted(expected))}, found "
                f"{', '.join(sorted(found)) or 'none'}; LoRA on experts cannot be offloaded: merge "
                "it first (peft: merge_and_unload())"
            )
        up, down = getattr(experts, _names(gated, False)[0]), experts.down_proj
        transposed = bool(experts.is_transposed)
        rows, columns = (up.shape[2], up.shape[1]) if transposed else up.shape[1:]
        intermediate = rows // 2 if gated else rows
        shape = (
            (up.shape[0], intermediate, columns)
            if transposed
            else (
                up.shape[0],
                columns,
                intermediate,
            )
        )
        if up.dim() != 3 or tuple(down.shape) != shape:
            raise ValueError(
                f"{where}: expected down_proj of shape {list(shape)} beside {list(up.shape)}, got "
                f"{list(down.shape)}"
            )
        interleaved = gated and not experts.is_concatenated
        activation, limit = _find_activation(experts, gated, interleaved, where)
        return cls(
            experts=up.shape[0],
            hidden_size=columns,
            intermediate_size=intermediate,
            activation=activation,
            limit=limit,
            gated=gated,
            biased=biased,
            transposed=transposed,
            interleaved=interleaved,
        )


def _names(gated: bool, biased: bool) -> list[str]:
    """Parameters of experts: up and down, and their biases behind them."""
    names = ["gate_up_proj" if gated else "up_proj", "down_proj"]
    return names + [f"{name}_bias" for name in names] if biased else names


def _find_activation(
    experts: Any, gated: bool, interleaved: bool, where: str
) -> tuple[str, float | None]:
    """Tell the activation by what it does, since families spell it in many ways.

    Returns:
        Its name, and what it cuts gate and up at, if it does.
    """
    limit = next((float(v) for name in LIMITS if (v := getattr(experts, name, None))), None)
    reach = max(12.0, 1.5 * (limit or 0))
    gate = torch.linspace(-reach, reach, 97)
    up = gate.roll(41)
    known = {name: function(gate) for name, function in ACTIVATIONS.items()}
    if gated:
        known = {name: values * up for name, values in known.items()}
        if limit is not None:
            cut = gate.clamp(max=limit), up.clamp(-limit, limit)
            known |= {name: function(*cut) for name, function in CLAMPED.items()}
        pair = torch.stack([gate, up], -1).flatten() if interleaved else torch.cat([gate, up])
        got = experts._apply_gate(pair[None])[0]
    else:
        got = experts.act_fn(gate)
    for name, values in known.items():
        if torch.allclose(got, values, rtol=1e-5, atol=1e-5):
            return name, limit if name in CLAMPED else None
    names = ", ".join([*ACTIVATIONS, *CLAMPED])
    raise ValueError(
        f"{where}: expected experts whose activation is one of {names}, got another: "
        f"{getattr(experts, 'act_fn', None) or type(experts)._apply_gate.__qualname__}"
    )


class InterfaceExperts(ExpertsModule):
    """Takes the place of the experts of a layer; has no parameters."""

    def __init__(self, form: ExpertsForm) -> None:
        super().__init__(form.experts, 0.0)
        self.form = form

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute what the router selected.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, k]; the number of experts stands for none, which a GPU's kernels leave
                out by themselves.
            top_k_weights: [T, k].
        """
        if not top_k_index.is_cuda and top_k_index.numel() > 0:
            if int(top_k_index.max()) == self.num_experts:
                none = top_k_index == self.num_experts
                top_k_index = top_k_index.masked_fill(none, 0)
                top_k_weights = top_k_weights.masked_fill(none, 0)
        return super().run(hidden_states, top_k_index, top_k_weights)


def make_without_weights(experts: type[nn.Module]) -> Callable[..., nn.Module]:
    """Return what makes a stand-in where a model would make `experts`."""

    def make(*args: Any, **kwargs: Any) -> nn.Module:
        with torch.device("meta"):
            original = experts(*args, **kwargs)
        return InterfaceExperts(ExpertsForm.of(original, "experts"))

    return make


class InterfaceAdapter(DecoderAdapter):
    """See `sida.huggingface.adapter.ExpertAdapter`."""

    looks_for = f"modules of transformers' experts interface ({', '.join(ATTRIBUTES)})"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether it is the experts of a layer."""
        return is_experts(module)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._forms: list[ExpertsForm] = []
        modules = dict(model.named_modules())
        stacks: dict[str, list[int]] = {}
        for name, module in modules.items():
            if not is_experts(module):
                continue
            parent, _, child = name.rpartition(".")
            stacks.setdefault(_stack_of(name, modules), []).append(len(self._layers))
            self.add_layer(parent, modules[parent], child)
            self._forms.append(
                module.form
                if isinstance(module, InterfaceExperts)
                else ExpertsForm.of(module, name)
            )
        for name, form in zip(self.layer_names, self._forms, strict=True):
            if form != self._forms[0]:
                raise ValueError(
                    f"expected experts of one form in all layers, got {self._forms[0]} in "
                    f"{self.layer_names[0]} and {form} in {name}"
                )
        self._stacks = [Stack(modules[name], layers, False) for name, layers in stacks.items()]
        self._form = self._forms[0]
        self.interleaved = self._form.interleaved
        self.num_experts = self._form.experts
        self.top_k = _top_k(model, self.num_experts)
        self.predictable = self.find_predictable()

    def stacks(self) -> list[Stack]:
        """Return the models around the layers."""
        return self._stacks

    def config(self, dtype: str) -> MoeConfig:
        """Return the shape of all experts, computed in `dtype`."""
        from sida import MoeConfig

        form = self._form
        limit = {} if form.limit is None else {"limit": form.limit}
        return MoeConfig(
            layers=len(self._forms),
            experts=form.experts,
            hidden_size=form.hidden_size,
            intermediate_size=form.intermediate_size,
            top_k=self.top_k,
            activation=form.activation,
            gated=form.gated,
            up_bias=form.biased,
            down_bias=form.biased,
            dtype=dtype,
            **limit,
        )

    def parameters(self, layer: int) -> list[ExpertParameter]:
        """Return the stacks of up and down projections, and their biases."""
        owner = self.own_experts(layer)
        return [
            ExpertParameter(owner, name, f"experts.{name}")
            for name in _names(self._form.gated, self._form.biased)
        ]

    def arrays(self, layer: int) -> list[ExpertArrays] | None:
        """Return every expert's part of the stacks; None where they are transposed."""
        if self._form.transposed or self._form.interleaved:
            return None
        stacks = [found.weight.detach() for found in self.parameters(layer)]
        if not all(stack.is_contiguous() for stack in stacks):
            return None
        up, down, *biases = [stack.unbind() for stack in stacks]
        none = (None,) * self.num_experts
        up_bias, down_bias = biases or (none, none)
        return list(zip(up, down, up_bias, down_bias, strict=True))

    def as_parameters(self, expert: int, arrays: ExpertArrays) -> dict[str, Tensor]:
        """Return an expert's part of the stacks."""
        up, down, *biases = (array for array in arrays if array is not None)
        if self._form.interleaved:
            up, *biases = (_interleave(up), *map(_interleave, biases[:1]), *biases[1:])
        if self._form.transposed:
            up, down = up.T, down.T
        names = _names(self._form.gated, self._form.biased)
        return {name: part[None] for name, part in zip(names, (up, down, *biases), strict=True)}

    def stand_in(self, layer: int) -> InterfaceExperts:
        """Return what stands for the experts of every layer."""
        return InterfaceExperts(self._form)


def _interleave(gate_up: Tensor) -> Tensor:
    """Let rows of gate and up take turns, where the gate's came first."""
    return torch.stack(gate_up.chunk(2), 1).flatten(0, 1)


def _stack_of(name: str, modules: dict[str, nn.Module]) -> str:
    """Return the name of the innermost model of transformers around a module."""
    around = name
    while around:
        around = around.rpartition(".")[0]
        if isinstance(modules[around], PreTrainedModel):
            return around
    raise ValueError(
        f"expected the experts {name!r} within a model of transformers, found none around them; "
        "pass the model that they belong to"
    )


def _top_k(model: nn.Module, experts: int) -> int:
    config = getattr(model, "config", None)
    for owner in (config, getattr(config, "text_config", None)):
        for name in TOP_K:
            value = getattr(owner, name, None)
            if isinstance(value, int) and 1 <= value <= experts:
                return value
    return 1
