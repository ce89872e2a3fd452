# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` of a model whose experts are offloaded: they are written one by one."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from sida.huggingface.progress import progress_bar
from sida.huggingface.safetensors_file import make_header, write, write_tensor
from sida.huggingface.shards import FORMAT, split_weights, write_index
from sida.torch.stand_in import OUTLINE, stand_ins

REFUSED = {
    "push_to_hub": "save to a folder, then huggingface_hub.upload_folder(...), or call "
    "model.push_to_hub(...)",
    "distributed_checkpoint": "an offloaded model is in one process",
}
"""Arguments of save_pretrained that are not taken while experts are offloaded."""

UNKNOWN = (
    "transformers converts these experts in a way that sida does not know; "
    "save_original_format=False saves them as the model has them"
)


def saving(model: PreTrainedModel) -> Callable[..., None]:
    """Return what stands for a model's save_pretrained while its experts are offloaded.

    It takes the same arguments. Configuration and code are saved by transformers; weights get the
    names and the layout that transformers would save them in, and one expert at a time is in
    memory. Where anything fails, the folder is as it was before.
    """
    original = model.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        if given.get("state_dict") is None and getattr(model, "_hf_peft_config_loaded", False):
            given["state_dict"] = _resident_weights(model)  # adapters are among them
        if given.get("state_dict") is not None:
            original(*call.args, **call.kwargs)
            return
        for name, advice in REFUSED.items():
            if given.get(name):
                raise ValueError(
                    f"save_pretrained({name}=True) does not work while experts are offloaded: "
                    f"{advice}"
                )
        if not given.get("is_main_process", True):
            return
        with _new_folder(Path(given["save_directory"]), given.get("variant")) as folder:
            original(folder, state_dict={})
            _save_weights(
                model,
                given.get("save_original_format", True),
                lambda weights: _Shards(
                    folder,
                    weights,
                    given.get("variant"),
                    given.get("max_shard_size", signature.parameters["max_shard_size"].default),
                ),
            )

    return save_pretrained


@contextmanager
def _new_folder(target: Path, variant: str | None) -> Iterator[Path]:
    """Give a folder whose files go to `target` at the end, and nowhere after an error."""
    if target.is_file():
        raise NotADirectoryError(f"expected a folder to save to, got the file {target}")
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as name:
            yield Path(name)
            saved = {file.name for file in Path(name).iterdir()}
            for file in sorted(saved):
                os.replace(Path(name, file), target / file)
    except BaseException:
        if is_new:
            shutil.rmtree(target, ignore_errors=True)
        raise
    infix = f"\\.{re.escape(variant)}" if variant else ""
    weights = re.compile(
        rf"model{infix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{infix}\.json"
    )
    for old in target.iterdir():
        if weights.fullmatch(old.name) and old.name not in saved:
            old.unlink()  # of what was saved here before, and would be read with it


class _Shards:
    """The files of a checkpoint, while weights are put in their places.

    Attributes:
        size: Bytes of all weights.
    """

    def __init__(
        self,
        folder: Path,
        weights: Mapping[str, Tensor],
        variant: str | None,
        max_shard_size: int | str,
    ) -> None:
        """Make the files, with room for weights of these shapes and dtypes.

        Raises:
            OSError: There is not enough room on the disk.
        """
        self.size, self._written = sum(weight.nbytes for weight in weights.values()), 0
        free = shutil.disk_usage(folder).free
        if free < self.size:
            raise OSError(
                f"the model's weights take {self.size:,} bytes, but the disk of {folder.parent} "
                f"has {free:,} free: choose another folder (push_to_hub: another TMPDIR)"
            )
        self._folder, self._infix = folder, f".{variant}" if variant else ""
        self._split = split_weights(weights, max_shard_size, self._infix)
        self._places: dict[str, tuple[Path, int]] = {}
        for file, names in self._split.filename_to_tensors.items():
            header, begins = make_header({name: weights[name] for name in names}, FORMAT)
            with (folder / file).open("wb", buffering=0) as opened:
                write(opened, header)
            self._places.update({name: (folder / file, begin) for name, begin in begins.items()})

    def write(self, name: str, weight: Tensor, part: int = 0) -> None:
        """Put a weight in its place, or one of the equal parts of one that has several."""
        path, begin = self._places[name]
        with path.open("r+b", buffering=0) as file:
            file.seek(begin + part * weight.nbytes)
            write_tensor(file, weight)
        self._written += weight.nbytes

    def finish(self, parameters: int) -> None:
        """Write the index, if there are several files.

        Args:
            parameters: Number of the model's parameters.
        """
        if self._written != self.size:
            raise RuntimeError(
                f"expected to save {self.size:,} bytes of weights, got {self._written:,}: {UNKNOWN}"
            )
        write_index(self._folder, self._split, self._infix, total_parameters=parameters)


def _save_weights(
    model: PreTrainedModel,
    original_format: bool,
    make_shards: Callable[[Mapping[str, Tensor]], _Shards],
) -> None:
    """Write all weights of a model.

    Args:
        model: The model.
        original_format: Whether weights get the names and layout of the family's checkpoints.
        make_shards: Gives the files for such weights.
    """

    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if not original_format:
            return weights
        converted: dict[str, Tensor] = revert_weight_conversion(_Whole(model, weights), weights)
        return converted

    resident = convert(remove_tied_weights_from_state_dict(_resident_weights(model), model))
    layers = {prefix: found.weights for prefix, found in stand_ins(model).items() if found.weights}
    outlines = {
        prefix: {f"{prefix}{name}": weight for name, weight in layer.outline().items()}
        for prefix, layer in layers.items()
    }
    places = {prefix: convert(outline) for prefix, outline in outlines.items()}
    everything = dict(resident)
    for place in places.values():
        everything.update(place)
    shards = make_shards(everything)
    with progress_bar("Saving weights", shards.size) as bar:
        for name, weight in resident.items():
            shards.write(name, weight)
            bar.update(weight.nbytes)
        for prefix, layer in layers.items():
            for expert in range(layer.experts):
                own = {f"{prefix}{name}": w for name, w in layer.read(expert).items()}
                shared = any(outlines[prefix][name].shape != w.shape for name, w in own.items())
                for name, weight in convert(own).items():
                    part = 0
                    if shared:
                        name, part = _place(name, weight, expert, layer.experts, places[prefix])
                    shards.write(name, weight, part)
                    bar.update(weight.nbytes)
    parameters = sum(w.numel() for outline in outlines.values() for w in outline.values())
    shards.finish(model.num_parameters() + parameters)


class _Whole:
    """A model as transformers' conversions see it, which may ask for parameters of experts."""

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
        self._model, self._weights = model, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """Return one of the weights that are being converted."""
        return self._weights[name]


def _resident_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what `state_dict` gives but for experts, and what is never saved."""
    token = OUTLINE.set(True)
    try:
        weights: dict[str, Tensor] = model.state_dict()
    finally:
        OUTLINE.reset(token)
    ignored = model._keys_to_ignore_on_save or ()
    return {name: w for name, w in weights.items() if not w.is_meta and name not in ignored}


def _place(
    name: str, weight: Tensor, expert: int, experts: int, places: Mapping[str, Tensor]
) -> tuple[str, int]:
    """Return the tensor that one expert's weight belongs to, and which part of it that is.

    Args:
        name: What its conversion called it; an expert that is converted alone is the first.
        weight: The expert's.
        expert: Its number.
        experts: Experts of the layer.
        places: What the conversion makes of the whole layer.
    """
    if name in places and places[name].nbytes == experts * weight.nbytes:
        return name, expert
    words = name.split(".")
    names = {
        ".".join([*words[:place], str(expert), *words[place + 1 :]])
        for place, word in enumerate(words)
        if word == "0"
    }
    found = names & places.keys()
    if len(found) != 1:
        raise RuntimeError(f"expected one place for {name}, found {len(found)}: {UNKNOWN}")
    return found.pop(), 0
