# SPDX-License-Identifier: Apache-2.0
"""Having transformers build a model without its experts."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sida.huggingface import interface, switch
from sida.huggingface.adapter import find_adapter, refuse_wrong_upstream

EXPERT_KEYS = r"\.experts\.|\.block_sparse_moe\.(in|out)put_linear\."
"""Of a checkpoint; such weights are not loaded into a model without experts."""
SCALE_KEYS = r"\.weight_scale_inv$"
"""Of a checkpoint in fp8: scales of weights that are loaded without them."""


class _WhileLoading(type):
    """Acts as the class that it stands for on all threads but the one that loads."""

    original: type[nn.Module]
    make: Callable[..., nn.Module]
    thread: int

    def __call__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        loads = threading.get_ident() == cls.thread
        made: nn.Module = (cls.make if loads else cls.original)(*args, **kwargs)
        return made

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)


_loading = threading.Lock()


@contextmanager
def without_experts(model_class: Any, config: Any) -> Iterator[None]:
    """Have transformers build MoE layers without experts, on this thread; one load at a time.

    transformers' own `register_patch_mapping` is not used: in 5.17 it imports whatever transformers
    has, torchvision's dependents too, and it leaves classes patched where building a model raises.

    Args:
        model_class: What is to be loaded: a model's class, or one of transformers' Auto classes.
        config: The model's.

    Raises:
        ValueError: sida knows no MoE layer of such models, or transformers computes them wrongly.
    """
    with _loading:
        built = _outline(model_class, config)
        refuse_wrong_upstream(built)
        patched = {type(m): stand_in for m in built.modules() if (stand_in := _stand_in(m))}
        if not patched:  # before any weight is loaded
            find_adapter(built, registered=False)
        base: Any = type(built)
        own = base.__dict__.get("_keys_to_ignore_on_load_unexpected")
        had_own = "_keys_to_ignore_on_load_unexpected" in base.__dict__
        ignored = [*(base._keys_to_ignore_on_load_unexpected or ()), EXPERT_KEYS, SCALE_KEYS]
        try:
            for kind, made in patched.items():
                setattr(sys.modules[kind.__module__], kind.__name__, made)
            base._keys_to_ignore_on_load_unexpected = ignored
            yield
        finally:
            for kind in patched:
                setattr(sys.modules[kind.__module__], kind.__name__, kind)
            if had_own:
                base._keys_to_ignore_on_load_unexpected = own
            elif "_keys_to_ignore_on_load_unexpected" in base.__dict__:
                del base._keys_to_ignore_on_load_unexpected


def _outline(model_class: Any, config: Any) -> nn.Module:
    """The model as transformers builds it, without memory for any weight."""
    build = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        model: nn.Module = build(copy.deepcopy(config))
    return model


def _stand_in(module: nn.Module) -> type | None:
    """What is to stand for a module's class; None if it is built as ever."""
    kind = type(module)
    if kind is switch.SparseMlp:
        make: Callable[..., nn.Module] = switch.SwitchSparseMlp
    elif interface.is_experts(module):
        make = interface.make_without_weights(kind)
    else:
        return None
    members = {"original": kind, "make": staticmethod(make), "thread": threading.get_ident()}
    return _WhileLoading(kind.__name__, (), members)
