# SPDX-License-Identifier: Apache-2.0
"""What a module does that stands where a model keeps experts, when the whole model is handled."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from sida.memory import available_memory

OUTLINE: ContextVar[bool] = ContextVar("outline", default=False)
"""Whether `state_dict` is to give experts on the meta device, which takes no memory."""

NOT_LOADED = (
    "{}: its experts are offloaded, and nothing is loaded into them: close() the handle, load the "
    "weights, and offload the model again"
)
"""Of the layer's name: why weights of experts in a state_dict are refused."""


class KeptWeights(Protocol):
    """The weights of a layer's experts, wherever they are kept."""

    @property
    def experts(self) -> int:
        """Number of experts."""

    @property
    def nbytes(self) -> int:
        """Bytes of all experts of the layer."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @property
    def device(self) -> torch.device:
        """Where they are computed."""

    def read(self, expert: int) -> dict[str, Tensor]:
        """Return one expert's weights by their names below the layer's experts.

        Where all experts share a parameter, the expert's part of it is [1, ...].
        """

    def outline(self) -> dict[str, Tensor]:
        """Return all weights on the meta device, by their names below the layer's experts."""

    def whole(self) -> dict[str, Tensor]:
        """Return copies of all weights in RAM, by their names below the layer's experts."""


class StandIn(nn.Module):
    """Stands where a model keeps the experts of a layer; has no parameters.

    Attributes:
        weights: What it stands for; None while a model is built.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: KeptWeights | None = None
        this: Any = self  # torch has no types for this method
        this.register_state_dict_pre_hook(check_memory)

    def refuse_conversion(self, function: Callable[[Tensor], Tensor]) -> None:
        """Raise RuntimeError if `function` would give the experts another dtype or device.

        Args:
            function: What `to`, `half` and the like do to every tensor of a model.
        """
        if self.weights is None:
            return
        dtype, device = self.weights.dtype, self.weights.device
        got = function(torch.empty(0, dtype=dtype, device=device))
        if got.dtype != dtype:
            raise RuntimeError(
                f"the model's experts are offloaded in {dtype}, the rest of it would become "
                f"{got.dtype}: close() the handle, convert the model and offload it again, or "
                "pass dtype= to sida.from_pretrained"
            )
        if got.device != device:
            raise RuntimeError(
                f"the model's offloaded experts are computed on {device}, the rest of it would go "
                f"to {got.device}: close() the handle, and pass device= when you offload or load "
                "the model again"
            )

    def weights_prefix(self, prefix: str) -> str:
        """Return what begins the names of its weights in a state_dict.

        Args:
            prefix: What would begin those of its own parameters, if it had any.
        """
        return prefix

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StandIn:
        self.refuse_conversion(fn)
        parent: Any = super()
        parent._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weights is not None:
            weights = self.weights.outline() if OUTLINE.get() else self.weights.whole()
            begin = self.weights_prefix(prefix)
            destination.update({begin + name: weight for name, weight in weights.items()})

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            error_msgs.append(NOT_LOADED.format(prefix[:-1]))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(
            "a model whose experts are offloaded can neither be copied nor pickled: close() the "
            "handle first, or save_pretrained(folder) and load that folder"
        )


def stand_ins(module: nn.Module) -> dict[str, StandIn]:
    """Return the stand-ins within a module, by what begins the names of their weights."""
    return {
        m.weights_prefix(f"{name}." if name else ""): m
        for name, m in module.named_modules()
        if isinstance(m, StandIn)
    }


def check_memory(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise MemoryError if `state_dict` of a module would take more RAM than there is."""
    kept = [found.weights for found in stand_ins(module).values() if found.weights is not None]
    needed, available = sum(weights.nbytes for weights in kept), available_memory()
    if not OUTLINE.get() and available is not None and needed > available:
        raise MemoryError(
            f"state_dict() brings all offloaded experts to memory: {needed:,} bytes, but "
            f"{available:,} are available; save_pretrained(folder) writes them one by one, "
            "and a submodule's state_dict() brings that part alone"
        )
