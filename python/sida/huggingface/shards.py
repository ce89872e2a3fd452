# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint's weights are shared out among safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor

FORMAT = {"format": "pt"}
"""What transformers wants a file to say of itself."""


def split_weights(
    weights: Mapping[str, Tensor], max_shard_size: int | str, infix: str = ""
) -> StateDictSplit:
    """Return which file has which weights, in the order in which they lie there.

    Args:
        weights: Shapes and dtypes count, values do not.
        max_shard_size: Of a file: bytes, or "5GB".
        infix: Of the files' names.
    """
    # each with a storage of its own: views would count as much as what they are views of
    sizes = {name: torch.empty_like(weight, device="meta") for name, weight in weights.items()}
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern=f"model{infix}{{suffix}}.safetensors", max_shard_size=max_shard_size
    )
    for names in split.filename_to_tensors.values():
        # the widest first, so that each begins at a multiple of its elements' size
        names.sort(key=lambda name: -weights[name].element_size())
    return split


def write_index(folder: Path, split: StateDictSplit, infix: str = "", **metadata: Any) -> None:
    """Write the index of several files; nothing if there is only one."""
    if not split.is_sharded:
        return
    index = {"metadata": {**metadata, **split.metadata}, "weight_map": split.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / f"model.safetensors.index{infix}.json").write_text(text, encoding="utf-8")
