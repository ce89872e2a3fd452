# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weights are packed: fp8 in blocks (DeepSeek-V3), MXFP4 (gpt-oss).

Experts are unpacked as they are read, by sida's store. transformers' own quantisers have no part in
loading: they would keep the packed weights on some GPUs, and take a matrix whose last block is not
full (576 rows in blocks of 128) for one of other blocks, or refuse it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

FP8 = ("F8_E4M3", "F8_E5M2")
"""What safetensors calls the dtypes of 8 bits."""


def is_quantised(config: Any) -> bool:
    """Whether a checkpoint's config says that its weights are quantised."""
    return bool(_quantisation(config))


def without_quantisation(config: Any, own: Mapping[str, Any]) -> Any:
    """Return a model's config as one of the same model with plain weights, with changes.

    Args:
        config: As the checkpoint has it.
        own: What of the config the user sets otherwise.

    Raises:
        ValueError: The checkpoint is quantised in a way that sida does not read.
    """
    method = _quantisation(config).get("quant_method")
    method = getattr(method, "value", method)
    if method == "fp8":
        _block_of(config)
    elif method != "mxfp4":
        raise ValueError(
            f"the checkpoint is quantised ({method or 'without a quant_method'}): expected weights "
            "in float32, float16 or bfloat16, or in what sida dequantises, fp8 in blocks (as "
            "DeepSeek-V3's) or MXFP4 (as gpt-oss'); load another checkpoint of the model"
        )
    plain = copy.deepcopy(config)
    del plain.quantization_config
    plain.update(own)
    return plain


def _quantisation(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    result: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return result


def _block_of(config: Any) -> tuple[int, int]:
    """Return rows and columns of the blocks that share a scale.

    Raises:
        ValueError: The fp8 weights are scaled otherwise.
    """
    quantisation = _quantisation(config)
    block = quantisation.get("weight_block_size")
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or any(not isinstance(extent, int) or extent < 1 for extent in block)
    ):
        raise ValueError(
            "expected fp8 weights scaled in blocks, quantization_config's weight_block_size being "
            f"two positive integers as DeepSeek-V3 has them, got {block!r}; fp8 with other scales "
            "is not supported"
        )
    if quantisation.get("activation_scheme", "dynamic") != "dynamic":
        raise ValueError(
            'expected fp8 weights with activation_scheme "dynamic", got '
            f"{quantisation['activation_scheme']!r}: scales of activations are not supported"
        )
    return int(block[0]), int(block[1])


def dequantise(
    model: PreTrainedModel, folder: Path, config: Any, expert_keys: str, unread: Collection[str]
) -> None:
    """Give weights that were loaded from fp8 their scales, band by band.

    Loading has turned their codes into the model's dtype, which has all of fp8's numbers.

    Args:
        model: As loaded, without its experts.
        folder: The checkpoint's.
        config: As the checkpoint has it.
        expert_keys: What matches the names of the experts' tensors there.
        unread: Names of tensors that loading reported to have no use for.

    Raises:
        ValueError: A weight in fp8 has no scales of the expected shape, or is not in the model
            under the checkpoint's name.
    """
    found = _tensors_in(folder, expert_keys)
    parameters = dict(model.named_parameters())
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    for name, tensor in found.items():
        if tensor.dtype not in FP8:
            continue
        weight = _find(parameters, name, model.base_model_prefix)
        if weight is not None:
            block = _block_of(config)
            _scale(weight, _read_scales(found, name, weight, block), block)
        elif name not in unread and not any(re.search(pattern, name) for pattern in ignored):
            raise ValueError(
                f"{name} is in fp8: expected a weight of that name in {type(model).__name__}, "
                "found none; outside of experts, sida dequantises weights that transformers "
                "neither renames nor merges"
            )


@dataclass(frozen=True)
class _Stored:
    file: Path
    dtype: str


def _tensors_in(folder: Path, expert_keys: str) -> dict[str, _Stored]:
    """Return where the tensors are that are none of an expert's."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if not re.search(expert_keys, name):
                    found[name] = _Stored(file, tensors.get_slice(name).get_dtype())
    return found


def _find(parameters: Mapping[str, Tensor], name: str, prefix: str) -> Tensor | None:
    """Return a parameter by the checkpoint's name, that of the model with or without a head."""
    for known in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if known in parameters:
            return parameters[known]
    return None


def _read_scales(
    found: Mapping[str, _Stored], name: str, weight: Tensor, block: tuple[int, int]
) -> Tensor:
    scales_name = f"{name}_scale_inv"
    if found[name].dtype != "F8_E4M3" or weight.dim() != 2:
        raise ValueError(
            f"{name}: expected a matrix in fp8 as F8_E4M3, got shape {list(weight.shape)} in "
            f"{found[name].dtype}"
        )
    if scales_name not in found:
        raise ValueError(f"{name} is in fp8: expected its scales in {scales_name}, found none")
    with safe_open(found[scales_name].file, "pt") as tensors:
        scales: Tensor = tensors.get_tensor(scales_name)
    expected = [-(-extent // step) for extent, step in zip(weight.shape, block, strict=True)]
    if list(scales.shape) != expected or found[scales_name].dtype not in ("F32", "BF16", "F16"):
        raise ValueError(
            f"{scales_name}: expected shape {expected} (weight_block_size {block[0]} x {block[1]}) "
            f"in F32, BF16 or F16, got {list(scales.shape)} in {found[scales_name].dtype}"
        )
    return scales.float()


def _scale(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
    """Multiply in place, a row of blocks at a time, so that little memory is needed."""
    rows, columns = block
    scales = scales.to(weight.device)
    with torch.no_grad():
        for band, row in zip(torch.split(weight, rows), scales, strict=True):
            band.copy_(band.float() * row.repeat_interleave(columns)[: weight.shape[1]])
