# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint without its experts, which stay in the file."""

from __future__ import annotations

import logging
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import huggingface_hub
import torch
import transformers
from transformers import PreTrainedModel

from sida._core import ExpertStore, checkpoint_tensors
from sida.huggingface import checks
from sida.huggingface.adapter import ExpertAdapter, find_adapter
from sida.huggingface.building import EXPERT_KEYS, without_experts
from sida.huggingface.engine import CheckpointExperts, Memory, Place
from sida.huggingface.handle import Offloaded
from sida.huggingface.look_ahead import LookAhead
from sida.huggingface.packed import dequantise, is_quantised, without_quantisation
from sida.huggingface.tables import open_tables
from sida.packing import what_is_lost

if TYPE_CHECKING:
    from sida import HashPredictor, HashTable
    from sida.torch import Predictor

REFUSED = {
    "device_map": "sida decides where weights go; use device=",
    "quantization_config": "the checkpoint's own, fp8 in blocks or MXFP4, is dequantised on load",
    "load_in_8bit": "sida offloads float32, float16 and bfloat16",
    "load_in_4bit": "sida offloads float32, float16 and bfloat16",
    "state_dict": "experts are read from the checkpoint",
    "torch_dtype": "use dtype=",
    "variant": "experts are read from model.safetensors, or the shards that its index names",
    "output_loading_info": "it returns a handle",
    "use_kernels": "kernels of the hub may replace a MoE layer whole, experts and all",
    "kernel_config": "kernels of the hub may replace a MoE layer whole, experts and all",
}

WHERE = ("revision", "cache_dir", "subfolder")
"""Arguments of transformers' from_pretrained that say where the checkpoint lies."""

LAYER_OF_EXPERT = re.compile(
    r"(.*?)(?:\.experts\.|(?<=\.block_sparse_moe)\.(?:in|out)put_linear\.)"
)
"""A tensor of experts in a checkpoint, and what comes before: the name of its layer."""

logger = logging.getLogger("sida")


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    memory: Memory,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    model_class: Any = None,
    routing: str = "exact",
    predictor: HashPredictor
    | HashTable
    | Predictor
    | str
    | os.PathLike[str]
    | Literal[False]
    | None = None,
    policy: str = "auto",
    threads: int | None = None,
    skip_padding: bool = False,
    offload_dir: str | os.PathLike[str] | None = None,
    host_memory: Memory | None = None,
    **hf_kwargs: Any,
) -> Offloaded:
    """Load a checkpoint whose experts stay in its files and are read as they are needed.

    Memory holds the other weights, which transformers loads as ever, and `memory` worth of experts;
    never all of them. `handle.model` is the model.

    Weights in fp8 with scales of blocks (DeepSeek-V3) and in MXFP4 (gpt-oss) are dequantised into
    `dtype` as they are read; a warning of the logger `sida` says what compression that gives up.

    Args:
        path: A folder with config.json and safetensors files, one or in shards; or the name of a
            model of the hub that is in its local cache.
        memory: As in `sida.offload`.
        device: As in `sida.offload`.
        dtype: Of weights and computation: "auto" (the checkpoint's; where that is packed and does
            not say, bfloat16), or a torch dtype or its name.
        model_class: Class of transformers to load; by default the one that the checkpoint's config
            names.
        routing: As in `sida.offload`.
        predictor: As in `sida.offload`.
        policy: As in `sida.offload`.
        threads: As in `sida.offload`.
        skip_padding: As in `sida.offload`.
        offload_dir: Of no effect: experts stay in the checkpoint.
        host_memory: As in `sida.offload`.
        **hf_kwargs: Passed to the class's from_pretrained; `revision`, `cache_dir` and `subfolder`
            say where the checkpoint lies, as they do there.

    Raises:
        OSError: The checkpoint is missing, damaged, or not in safetensors files.
        ValueError: As in `sida.offload`; or the checkpoint is quantised in another way.
    """
    checks.warn_of_untested_transformers()
    checks.check_options(
        routing=routing,
        predictor=predictor,
        policy=policy,
        threads=threads,
    )
    place = Place(checks.find_device(device, torch.device("cpu"), host_memory), host_memory)
    for name, reason in REFUSED.items():
        if hf_kwargs.get(name) is not None:
            raise ValueError(f"from_pretrained does not take {name}=: {reason}")
    where = {name: hf_kwargs.pop(name) for name in WHERE if name in hf_kwargs}
    folder = _find_folder(path, **where)
    _check_folder(folder)
    names = checkpoint_tensors(folder)  # says what is wrong with which file, before others read it
    config = hf_kwargs.get("config") or transformers.AutoConfig.from_pretrained(folder)
    model = _load_without_experts(
        folder, model_class or _class_of(config), config, dtype, hf_kwargs
    )
    adapter = find_adapter(model, registered=False)  # which need the experts that are not there
    kind = checks.DTYPES.get(_dtype_of(model))
    if kind is None:
        raise ValueError(
            f"expected a model in float32, float16 or bfloat16, got {_dtype_of(model)}: pass dtype="
        )
    store = ExpertStore.open(
        folder,
        layers=_layers_in(folder, names, adapter),
        dtype=kind,
        config=adapter.config(kind),
        interleaved=adapter.interleaved,
    )
    if lost := what_is_lost(store):
        logger.warning(lost)
    return Offloaded(
        model,
        adapter,
        CheckpointExperts(store, place),
        memory=memory,
        device=place.device,
        routing=routing,
        tables=open_tables(predictor, adapter, device=place.device),
        look_ahead=LookAhead(adapter, wanted=predictor is not False),
        policy=policy,
        threads=threads,
        skip_padding=skip_padding,
    )


def _load_without_experts(
    folder: Path, model_class: Any, config: Any, dtype: str | torch.dtype, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Have transformers load the rest of the model, and dequantise what is packed of it."""
    kwargs = {**kwargs, "output_loading_info": True}
    if is_quantised(config):
        own = {name: value for name, value in kwargs.items() if hasattr(config, name)}
        plain = without_quantisation(config, own)
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        kwargs["config"] = plain
        if dtype == "auto" and plain.dtype is None:
            dtype = torch.bfloat16
    with without_experts(model_class, kwargs.get("config") or config):
        model, report = model_class.from_pretrained(folder, dtype=dtype, **kwargs)
    dequantise(model, folder, config, EXPERT_KEYS, report["unexpected_keys"])
    loaded: PreTrainedModel = model
    return loaded


def _find_folder(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str = "",
) -> Path:
    """Return a checkpoint's folder: `path`, or where the hub's cache has the model of that name."""
    folder = Path(path)
    if folder.is_dir():
        return folder / subfolder
    try:
        snapshot = huggingface_hub.snapshot_download(
            os.fspath(path),
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"expected a checkpoint's folder, found none at {folder}, nor a model of that name{at} "
            "in the hub's cache; huggingface_hub.snapshot_download(name) fetches one"
        ) from error
    return Path(snapshot) / subfolder


def _layers_in(folder: Path, tensors: list[str], adapter: ExpertAdapter) -> list[str]:
    """Return what the checkpoint of these tensors calls the model's MoE layers.

    Families rename modules from checkpoint to model, but not the numbers in their names.
    """
    experts = (LAYER_OF_EXPERT.match(name) for name in tensors)
    found = dict.fromkeys(layer[1] for layer in experts if layer)
    by_numbers: dict[tuple[str, ...], list[str]] = {}
    for name in found:
        by_numbers.setdefault(_numbers(name), []).append(name)
    names = []
    for name in adapter.layer_names:
        alike = by_numbers.get(_numbers(name), [])
        if name not in found and len(alike) != 1:
            raise ValueError(
                f"{folder}: expected the experts of the layer {name}, found "
                f"{', '.join(alike) or 'none'} among {len(found)} layers with experts"
            )
        names.append(name if name in found else alike[0])
    return names


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdigit())


def _check_folder(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled:
        raise OSError(
            f"{folder} has its weights in a pickle ({pickled[0]}), which cannot be read expert by "
            f"expert; convert it once: sida convert {shlex.quote(str(folder))} NEW_FOLDER"
        )
    raise FileNotFoundError(f"expected *.safetensors files in {folder}, found none")


def _class_of(config: Any) -> Any:
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModel


def _dtype_of(model: PreTrainedModel) -> torch.dtype:
    kind: torch.dtype = next(model.parameters()).dtype
    return kind
