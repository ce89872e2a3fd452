# SPDX-License-Identifier: Apache-2.0
"""A model's experts, moved from its modules to one file and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sida.huggingface.adapter import ExpertAdapter, ExpertParameter

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""As safetensors calls them."""
HEADER_ALIGNMENT = 64


@dataclass(frozen=True)
class _Saved:
    parameter: ExpertParameter
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    begin: int
    end: int


class ExpertFile:
    """The experts of a model in a safetensors file; while they are there, the modules hold none.

    Attributes:
        path: The file, in a temporary folder of its own.
    """

    def __init__(self, adapter: ExpertAdapter, folder: str | os.PathLike[str] | None) -> None:
        """Move all experts to a file, layer by layer; on any error the model is as before.

        Args:
            adapter: The model.
            folder: Where the temporary folder is made; by default the system's place for them.

        Raises:
            OSError: There is not enough room, or writing failed.
        """
        parent = Path(folder) if folder is not None else Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        self._saved, self._moved, size = _plan(adapter), 0, 0
        if self._saved:
            size = self._saved[-1].end
        _check_room(parent, size)
        self.path = (
            Path(tempfile.mkdtemp(prefix="sida-experts-", dir=parent)) / "experts.safetensors"
        )
        # Unbuffered: what a full disk did not take must not fail once more when the file is closed.
        self._file: BinaryIO = self.path.open("w+b", buffering=0)
        self._discard = weakref.finalize(self, _remove, self._file, self.path.parent)
        try:
            self._write(len(adapter.layer_names))
        except OSError as error:
            self.restore()
            raise OSError(
                error.errno,
                f"{error.strerror}; the experts take {size:,} bytes: choose another folder with "
                "offload_dir=",
                str(self.path),
            ) from error
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put equal weights back into the modules, and remove the file."""
        for saved in self._saved[: self._moved]:
            weight = _read(self._file, self._begin + saved.begin, saved).to(saved.device)
            saved.parameter.replace(weight)
        self._discard()

    def _write(self, layers: int) -> None:
        header = {
            saved.name: {
                "dtype": DTYPES[saved.dtype],
                "shape": saved.shape,
                "data_offsets": [saved.begin, saved.end],
            }
            for saved in self._saved
        }
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
        _write(self._file, len(text).to_bytes(8, "little") + text)
        self._begin = 8 + len(text)
        each = len(self._saved) // layers
        for layer in range(layers):
            here = self._saved[layer * each : (layer + 1) * each]
            for saved in here:
                weight = saved.parameter.weight.detach().to("cpu").contiguous()
                _write(self._file, weight.view(torch.uint8).numpy().data)
            for saved in here:
                empty = torch.empty(saved.shape, dtype=saved.dtype, device="meta")
                saved.parameter.replace(empty)
                self._moved += 1


def _plan(adapter: ExpertAdapter) -> list[_Saved]:
    saved, begin = [], 0
    for layer, name in enumerate(adapter.layer_names):
        for parameter in adapter.parameters(layer):
            weight = parameter.weight
            end = begin + weight.numel() * weight.element_size()
            saved.append(
                _Saved(
                    parameter,
                    f"{name}.{parameter.key}",
                    tuple(weight.shape),
                    weight.dtype,
                    weight.device,
                    begin,
                    end,
                )
            )
            begin = end
    return saved


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _read(file: BinaryIO, begin: int, saved: _Saved) -> Tensor:
    weight = torch.empty(saved.shape, dtype=saved.dtype)
    view = memoryview(weight.view(torch.uint8).numpy().data).cast("B")
    while view:
        count = os.preadv(file.fileno(), [view], begin)
        if count == 0:
            raise OSError(f"the file of the experts ends early: {file.name}")
        view, begin = view[count:], begin + count
    return weight


def _remove(file: BinaryIO, folder: Path) -> None:
    file.close()
    shutil.rmtree(folder, ignore_errors=True)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"the experts take {size:,} bytes, but {folder} has {free:,} free: choose another "
            "folder with offload_dir="
        )
    kind = file_system(folder)
    if kind in ("tmpfs", "ramfs"):
        warnings.warn(
            f"{folder} is a {kind}, that is RAM: experts moved there save none; choose a folder "
            "on a disk with offload_dir=",
            RuntimeWarning,
            stacklevel=4,
        )


def file_system(folder: Path) -> str | None:
    """Return the kind of file system that a folder is on, where the kernel tells."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    target, best, kind = os.path.realpath(folder), "", None
    for mount in mounts:
        point, name = mount.split()[1:3]
        point = point.encode().decode("unicode_escape")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind
