# SPDX-License-Identifier: Apache-2.0
"""Pickled checkpoints (pytorch_model.bin or shards) made into safetensors, tensor by tensor."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sida.huggingface.safetensors_file import DTYPES, make_header, write, write_tensor
from sida.huggingface.shards import FORMAT, split_weights, write_index

WEIGHTS = "pytorch_model.bin"
INDEX = f"{WEIGHTS}.index.json"
NOT_COPIED = (".bin", ".bin.index.json", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".gguf", ".onnx")
"""Ends of the names of weights in other formats."""
MOST_MAPPED = 256 << 20
"""Bytes of a pickle that are read before it is opened anew, which lets their pages go."""
ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        files: With weights, in the new folder.
        copied: Config, tokenizer and what else there was.
        tensors: Number of them.
        size: Bytes that they take.
    """

    files: list[str]
    copied: list[str]
    tensors: int
    size: int


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    max_shard_size: str = "5GB",
    begun: Callable[[int], None] = lambda tensors: None,
    advanced: Callable[[], None] = lambda: None,
) -> Converted:
    """Write the weights of a pickled checkpoint as safetensors, and copy its other files.

    Names, shapes, dtypes and values stay; a tensor that has several names is written under each of
    them, since which ones a model reads depends on its class. Pickles are read with `weights_only`,
    so that no code of theirs runs, and mapped: memory holds one tensor and up to 256 MiB of pages.

    Args:
        source: Folder with pytorch_model.bin, or pytorch_model.bin.index.json and shards.
        target: Folder to make; there after all is written, or not at all.
        max_shard_size: Of a file of weights, as in transformers' save_pretrained.
        begun: Called with the number of tensors.
        advanced: Called after each tensor.

    Raises:
        OSError: There is no such checkpoint, something is where it should go, or no room for it.
        ValueError: The pickle is damaged, or holds something else than tensors.
    """
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"expected a folder to make, but something is at {target} already")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"expected a folder to make {target.name} in, found none: {target}")
    pickles = _find_pickles(source)
    outline = {name: weight for found in pickles for name, weight in found.outline.items()}
    size = sum(weight.nbytes for weight in outline.values())
    _check_room(target.absolute().parent, size)
    begun(len(outline))
    with _new_folder(target) as folder:
        copied = _copy_others(source, folder)
        files = _write_weights(folder, pickles, outline, max_shard_size, advanced)
    return Converted(files, copied, len(outline), size)


class _Pickle:
    """A file of pickled tensors, mapped.

    Attributes:
        outline: Those that there is need of: shapes and dtypes, on the meta device.
    """

    def __init__(self, path: Path, names: Collection[str] | None = None) -> None:
        """Read what there is, but no values.

        Args:
            path: The file.
            names: Tensors that there is need of; None: all.

        Raises:
            ValueError: The file is damaged, lacks a tensor, or holds something else than tensors.
        """
        self._path, self._mapped = path, 0
        self._weights: Mapping[str, Tensor] | None = None
        found = _load(path, "meta")
        self.outline: dict[str, Tensor] = {}
        for name in found if names is None else names:
            if name not in found:
                raise ValueError(f"{path}: expected the tensor {name}, as {INDEX} says, found none")
            _check_tensor(path, name, found[name])
            self.outline[name] = found[name]

    def read(self, name: str) -> Tensor:
        """Return a tensor; another one may be gone by then, so let go of each before the next."""
        size = self.outline[name].nbytes
        if self._weights is None or self._mapped + size > MOST_MAPPED:
            self._weights, self._mapped = None, 0  # unmaps what was read
            self._weights = _load(self._path, "cpu")
        self._mapped += size
        return self._weights[name]

    def close(self) -> None:
        """Unmap the file."""
        self._weights, self._mapped = None, 0


def _load(path: Path, device: str) -> Mapping[str, Tensor]:
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            raise ValueError(
                f"{path}: expected a file as torch.save writes it since torch 1.6; others cannot "
                "be read tensor by tensor: where there is memory for all of it, write it anew "
                "with torch.save(torch.load(file, weights_only=True), file)"
            )
    try:
        found = torch.load(os.fspath(path), map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected tensors and nothing else, found what could run code when it is "
            f"read, and is not read therefore ({_first_line(error)})"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors by name, got {_kind(found)}")
    return found


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _kind(value: Any) -> str:
    return type(value).__name__


def _check_tensor(path: Path, name: Any, value: Any) -> None:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise ValueError(
            f"{path}: expected a dict of tensors by name, found {_kind(value)} at {name!r}; where "
            "the weights are one entry of several, save that entry alone"
        )
    if value.layout != torch.strided or value.dtype not in DTYPES:
        raise ValueError(
            f"{path}: {name} is in {value.dtype} ({value.layout}), which safetensors files that "
            f"sida writes do not have: expected {', '.join(DTYPES.values())}, dense"
        )


def _find_pickles(source: Path) -> list[_Pickle]:
    """Return the files of a checkpoint, in the order of its tensors."""
    if not source.is_dir():
        raise FileNotFoundError(f"expected a checkpoint's folder, found none at {source}")
    if any(source.glob("*.safetensors")):
        raise ValueError(f"{source} has its weights in safetensors files already: use it as it is")
    if (source / WEIGHTS).is_file():
        return [_Pickle(source / WEIGHTS)]
    if not (source / INDEX).is_file():
        raise FileNotFoundError(f"expected {WEIGHTS} or {INDEX} in {source}, found neither")
    names: dict[str, list[str]] = {}
    for name, file in _read_index(source / INDEX).items():
        names.setdefault(file, []).append(name)
    missing = [file for file in names if not (source / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{source / INDEX}: expected the file {missing[0]}, found none")
    return [_Pickle(source / file, found) for file, found in names.items()]


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor; all lie beside the index."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = [file for file in places.values() if file != os.path.basename(file)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}: expected JSON with "weight_map", the file of each tensor'
        ) from error
    if wrong:
        raise ValueError(f"{path}: expected names of files in that folder, got {wrong[0]!r}")
    result: dict[str, str] = places
    return result


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"the weights take {size:,} bytes, but the disk of {folder} has {free:,} free: choose "
            "another folder",
        )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a folder that is called `target` at the end, and is gone after an error."""
    folder = target.absolute().parent / f".{target.name}.{os.getpid()}.partial"
    folder.mkdir()
    try:
        yield folder
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_others(source: Path, folder: Path) -> list[str]:
    """Copy config, tokenizer and whatever else lies beside the weights."""
    copied = []
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, folder / file.name)
            copied.append(file.name)
    return copied


def _write_weights(
    folder: Path,
    pickles: Sequence[_Pickle],
    outline: Mapping[str, Tensor],
    max_shard_size: str,
    advanced: Callable[[], None],
) -> list[str]:
    homes = {name: found for found in pickles for name in found.outline}
    split = split_weights(outline, max_shard_size)
    for file, names in split.filename_to_tensors.items():
        header, _ = make_header({name: outline[name] for name in names}, FORMAT)
        with (folder / file).open("wb", buffering=0) as opened:
            write(opened, header)
            for name in names:
                write_tensor(opened, homes[name].read(name))
                advanced()
        for found in pickles:
            found.close()
    write_index(folder, split)
    return list(split.filename_to_tensors)
