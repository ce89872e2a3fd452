# SPDX-License-Identifier: Apache-2.0
"""Methods of a model that act on all its weights, while its experts are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sida.huggingface.adapter import ExpertAdapter
from sida.huggingface.saving import saving
from sida.torch.stand_in import check_memory, stand_ins


class Guards:
    """What is changed on the modules around the experts of a model, on the instances.

    `to`, `half` and the like ask the experts first, so that none of the other weights has changed
    where they refuse; `state_dict` checks that there is memory; `save_pretrained` streams.
    """

    def __init__(self, model: nn.Module, adapter: ExpertAdapter) -> None:
        """Change nothing yet."""
        names = {""}
        for name in adapter.layer_names:
            parts = name.split(".")
            names.update(".".join(parts[: end + 1]) for end in range(len(parts)))
        self._around: list[Any] = [model.get_submodule(name) for name in sorted(names)]
        self._hooks: list[RemovableHandle] = []

    def install(self) -> None:
        """Guard the modules around the stand-ins."""
        for module in self._around:
            module.__dict__["_apply"] = _asking_first(module)
            self._hooks.append(module.register_state_dict_pre_hook(check_memory))
            if isinstance(module, PreTrainedModel):
                module.__dict__["save_pretrained"] = saving(module)

    def remove(self) -> None:
        """Undo `install`, and let go of the model."""
        for hook in self._hooks:
            hook.remove()
        for module in self._around:
            module.__dict__.pop("_apply", None)
            module.__dict__.pop("save_pretrained", None)
        self._hooks, self._around = [], []


def _asking_first(module: Any) -> Callable[..., nn.Module]:
    original = module._apply

    def apply(fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        for found in stand_ins(module).values():
            found.refuse_conversion(fn)
        converted: nn.Module = original(fn, *args, **kwargs)
        return converted

    return apply
