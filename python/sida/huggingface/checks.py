# SPDX-License-Identifier: Apache-2.0
"""What sida refuses before it touches a model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from sida._core import check_cuda
from sida.huggingface.adapter import ExpertAdapter

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ROUTINGS = ("exact", "predicted")
POLICIES = ("fifo", "lru", "lfu", "lookahead", "auto")

TESTED = (Version("5.17"), Version("5.23"))
"""The minor versions of transformers that sida's tests run on, the newest last."""


def warn_of_untested_transformers() -> None:
    """Warn if the installed transformers is none that sida was tested with; it may work."""
    installed = Version(transformers.__version__)
    if installed.release[:2] not in [version.release for version in TESTED]:
        warnings.warn(
            f"sida is tested with transformers {' and '.join(map(str, TESTED))}, this is "
            f"{installed}: it may work, but compare results with the model's own before relying on "
            f'them, or install "transformers~={TESTED[-1]}.0"',
            RuntimeWarning,
            stacklevel=3,
        )


def check_options(*, routing: str, predictor: Any, policy: str, threads: int | None) -> None:
    """Raise ValueError for options that cannot be right."""
    if routing not in ROUTINGS:
        raise ValueError(f'expected routing="exact" or "predicted", got {routing!r}')
    if routing == "predicted" and (predictor is None or predictor is False):
        raise ValueError(
            'routing="predicted" needs predictor=: a predictor from sida.train_predictor(model, '
            "batches), its file, or a recorded HashTable"
        )
    if policy not in POLICIES:
        raise ValueError(f"expected policy to be one of {', '.join(POLICIES)}, got {policy!r}")
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise ValueError(f"expected threads >= 1, or None for torch's number, got {threads!r}")


def find_device(device: Any, model_device: torch.device, host_memory: Any) -> str:
    """Return where experts are computed: "cpu", or "cuda:0" and the like.

    Args:
        device: What was asked for; None: where the model is.
        model_device: Where the model is.
        host_memory: What was asked for.

    Raises:
        ValueError: sida does not compute there.
        CudaError: There is no such GPU, or no part of sida for it.
    """
    chosen = torch.device(model_device if device is None else device)
    if chosen.type == "cuda":
        name = f"cuda:{_current_gpu() if chosen.index is None else chosen.index}"
        check_cuda(name)
        return name
    if host_memory is not None:
        raise ValueError('host_memory= bounds pinned memory and goes with device="cuda"')
    if chosen.type != "cpu":
        raise ValueError(f'expected device="cpu" or device="cuda", got {str(chosen)!r}')
    if model_device.type != "cpu":
        raise ValueError(
            f"the model is on {model_device}, its experts would be computed on the CPU: call "
            'model.to("cpu") first'
        )
    return "cpu"


def _current_gpu() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def check_model(model: nn.Module) -> None:
    """Raise ValueError for models whose weights or layers somebody else moves or replaces."""
    placed = getattr(model, "hf_device_map", None) or {}
    hooked = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked or len(set(placed.values())) > 1:
        raise ValueError(
            f"accelerate dispatched this model (device_map {placed or 'with hooks'}); load it "
            "without device_map, or let sida.from_pretrained load it"
        )
    if getattr(model, "use_kernels", False):
        raise ValueError(
            "the model was loaded with use_kernels=True, and kernels of the hub may replace a MoE "
            "layer whole, experts and all: load it without"
        )
    method = getattr(model, "quantization_method", None)
    if method is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"the model is quantised ({getattr(method, 'value', method) or 'bitsandbytes'}); "
            "sida offloads float32, float16 and bfloat16: load it without quantization_config"
        )
    for name, parameter in model.named_parameters():
        if type(parameter).__module__.startswith("bitsandbytes"):
            raise ValueError(
                f"{name} is quantised by bitsandbytes ({type(parameter).__name__}); sida offloads "
                "float32, float16 and bfloat16: load the model without quantization_config"
            )


def experts_dtype(adapter: ExpertAdapter) -> str:
    """Return the one dtype of all experts, checking that they are there.

    Raises:
        ValueError: They were taken already, are empty, or of several or other dtypes.
    """
    if not adapter.has_experts():
        raise ValueError(
            "this model's experts are offloaded already: close() that handle before making "
            "another, or resize() it"
        )
    found: dict[torch.dtype, str] = {}
    for layer, name in enumerate(adapter.layer_names):
        for parameter in adapter.parameters(layer):
            weight = parameter.weight
            if weight.is_meta:
                raise ValueError(
                    f"{name}.{parameter.key} has no memory (it is on device meta): load the "
                    "model's weights first, or let sida.from_pretrained load them"
                )
            found.setdefault(weight.dtype, f"{name}.{parameter.key}")
    if len(found) > 1:
        raise ValueError(
            "expected all experts in one dtype, got "
            + ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
            + ": convert the model with model.to(dtype)"
        )
    (dtype,) = found
    if dtype not in DTYPES:
        raise ValueError(f"expected experts in float32, float16 or bfloat16, got {dtype}")
    return DTYPES[dtype]
