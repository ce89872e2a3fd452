# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps what sida deals with; one adapter for each family or module of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from sida.huggingface.router_choice import LinearRouter
from sida.torch.teacher import MoeAdapter

if TYPE_CHECKING:
    from sida import MoeConfig

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states [T, H], expert ids [T, k], weights [T, k]) to [T, H]."""
ComputePredicted = Callable[[Tensor], Tensor]
"""Hidden states [T, H] to [T, H], routed by the hash table of the pass."""


ExpertArrays = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Up and down projection and their biases of one expert, as `sida.OffloadedExperts` has them."""


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter that holds weights of experts, and where the model keeps it."""

    module: nn.Module
    """The module that owns it."""
    name: str
    """Its name there."""
    key: str
    """Its name below its MoE layer, as checkpoints spell it."""

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now."""
        weight = getattr(self.module, self.name)
        assert isinstance(weight, Tensor)
        return weight

    def replace(self, weight: Tensor) -> None:
        """Put other weights in the parameter's place; it asks for gradients as before."""
        gradients = self.weight.requires_grad
        setattr(self.module, self.name, nn.Parameter(weight, requires_grad=gradients))


@dataclass(frozen=True)
class Stack:
    """A stack of blocks whose call is one pass through its MoE layers."""

    module: Any
    layers: Sequence[int]
    """Indices of its MoE layers."""
    predictable: bool
    """Whether its routing can be foretold from its embeddings."""


class ExpertAdapter(MoeAdapter, Protocol):
    """What offloading needs of a model beyond what predictors do.

    Whatever `install` changed, `remove` puts back; neither copies weights. It is made of a model,
    original or offloaded.
    """

    looks_for: ClassVar[str]
    """The modules that it is for, in words."""
    interleaved: bool
    """Whether gate and up take turns in the parameters."""

    def __init__(self, model: nn.Module) -> None: ...

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether a model that has this module is one for this adapter."""

    def stacks(self) -> list[Stack]:
        """Return the model's stacks with MoE layers, in the order in which they run."""

    def config(self, dtype: str) -> MoeConfig:
        """Return the shape of all experts of the model, computed in `dtype`."""

    def has_experts(self) -> bool:
        """Whether the model holds its experts itself, and no handle has taken them."""

    def parameters(self, layer: int) -> list[ExpertParameter]:
        """Return the parameters of a layer's experts, as many in every layer.

        Raises:
            ValueError: The experts are not the family's own modules, as with LoRA on experts.
        """

    def arrays(self, layer: int) -> list[ExpertArrays] | None:
        """Return every expert of a layer without copying it; None where its layout forbids that."""

    def as_parameters(self, expert: int, arrays: ExpertArrays) -> dict[str, Tensor]:
        """Return an expert's arrays as the family's parameters hold them.

        They are named below the layer's experts; where all experts share a parameter, the expert's
        part of it is [1, ...].
        """

    def experts(self, layer: int) -> nn.Module:
        """Return the module that is a layer's experts now."""

    def install(
        self, layer: int, compute: Compute, compute_predicted: ComputePredicted | None
    ) -> None:
        """Let `compute` stand in for a layer's experts.

        Args:
            layer: Index of the MoE layer.
            compute: Stands in for the experts; the model's own router calls on it.
            compute_predicted: Stands in for router and experts both, where it is given.
        """

    def choices(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return what a layer's router chooses for hidden states [T, H], as a look ahead.

        The router's hooks are not told, and nothing of the model changes.

        Returns:
            Expert ids [T, k]; ids that are no expert's stand for none. None in training, where
            routers draw random numbers.

        Raises:
            Exception: The layer has no router that sida knows, or the router takes something else.
        """

    def linear_router(self, layer: int, hidden: Tensor) -> LinearRouter | None:
        """Return a layer's router as a kernel asks it for a look ahead, instead of `choices`.

        Args:
            layer: Whose router.
            hidden: The input that it is about to be asked on.

        Returns:
            Its weights, the same object as long as they are the same; None for a router that is no
            linear map, and in training.

        Raises:
            Exception: As `choices`.
        """

    def remove(self, layer: int) -> None:
        """Undo `install`: the layer has its own experts and router again."""


WRONG_UPSTREAM = {
    "NllbMoeSparseMLP": (
        "NLLB-MoE cannot be offloaded: its module in transformers routes wrongly. Its experts take "
        "the router's mask of 0 and 1 for expert ids, so that whatever the router chose, only the "
        "first two experts run, the first one several times for each token; sida would have to "
        "repeat that, or compute something else than the model. It is refused until transformers "
        "is right"
    )
}
"""Modules that do not compute what they should in the versions of transformers that sida knows."""


def refuse_wrong_upstream(model: nn.Module) -> None:
    """Raise ValueError for a model that transformers itself computes wrongly."""
    for module in model.modules():
        reason = WRONG_UPSTREAM.get(type(module).__name__)
        if reason is not None:
            raise ValueError(f"{type(model).__name__}: {reason}")


_registered: list[type[ExpertAdapter]] = []
"""Adapters that users taught sida, the last one first."""
_Adapter = TypeVar("_Adapter", bound="type[ExpertAdapter]")


def register_adapter(adapter: _Adapter) -> _Adapter:
    """Teach sida a MoE module; from now on `offload` takes models that have it.

    The usual way to write an adapter is to derive from `sida.ModuleAdapter`, which asks for a few
    answers about the module; whatever has all that `sida.huggingface.ExpertAdapter` lists will do.
    What was registered last is asked first, and before the adapters that sida has.

    Args:
        adapter: The class, called with the model as its one argument.

    Returns:
        The class, so that this can decorate it.

    Raises:
        TypeError: It is no class, or something is missing in it; the message lists what.
    """
    if not isinstance(adapter, type):
        raise TypeError(
            f"expected a class, whose objects are made of a model, got {type(adapter).__name__}"
        )
    members = {name for name, _ in inspect.getmembers(ExpertAdapter, callable) if name[0] != "_"}
    missing = {name for name in members if not callable(getattr(adapter, name, None))}
    missing |= getattr(adapter, "__abstractmethods__", frozenset())
    if missing:
        raise TypeError(
            f"{adapter.__name__} cannot stand for a MoE module: expected it to have "
            f"{', '.join(f'{name}()' for name in sorted(missing))}; see sida.ModuleAdapter"
        )
    if adapter in _registered:
        _registered.remove(adapter)
    _registered.insert(0, adapter)
    return adapter


def find_adapter(model: nn.Module, *, registered: bool = True) -> ExpertAdapter:
    """Return the adapter for a model.

    Args:
        model: The model.
        registered: Whether those are asked too that `register_adapter` was given.

    Raises:
        ValueError: sida knows no MoE layer of the model; the message lists what was looked for and
            what the model has. Or transformers computes the model wrongly, or an adapter that was
            registered says what does not fit the model.
    """
    from sida.huggingface.interface import InterfaceAdapter
    from sida.huggingface.switch import SwitchAdapter

    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch module, got {type(model).__name__}")
    refuse_wrong_upstream(model)
    adapters: list[type[ExpertAdapter]] = [SwitchAdapter, InterfaceAdapter]
    if registered:
        adapters = [*_registered, *adapters]
    for adapter in adapters:
        if any(adapter.matches(module) for module in model.modules()):
            return adapter(model)
    hints = ("expert", "moe", "router", "sparse")
    found = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if any(hint in type(module).__name__.lower() for hint in hints)
        }
    )
    looked_for = [adapter.looks_for for adapter in adapters]
    raise ValueError(
        f"{type(model).__name__} has no MoE layer that sida knows: looked for "
        f"{', '.join(looked_for[:-1])} and {looked_for[-1]}, found "
        f"{', '.join(found) if found else 'no module that looks like one'}. "
        "A MoE module of your own sida learns from sida.register_adapter, and sida.offload takes "
        "its model"
    )


def integer_tensor(values: tuple[Any, ...]) -> int:
    """Return the place of the first tensor of integers among a router's return values."""
    for place, value in enumerate(values):
        if isinstance(value, Tensor) and not value.is_floating_point():
            return place
    raise TypeError(f"expected a router that returns expert ids, got {len(values)} other values")
