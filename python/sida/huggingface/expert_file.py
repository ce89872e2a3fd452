# SPDX-License-Identifier: Apache-2.0
"""A model's experts, moved from its modules to one file and back."""

from __future__ import annotations

import errno
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
from sida.huggingface.progress import progress_bar
from sida.huggingface.safetensors_file import make_header, write, write_tensor


@dataclass(frozen=True)
class _Saved:
    parameter: ExpertParameter
    weight: Tensor
    """On the meta device: its shape and dtype."""
    device: torch.device
    begin: int
    """Of its bytes in the file."""


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
        header, self._saved = _plan(adapter)
        self._moved, size = 0, sum(saved.weight.nbytes for saved in self._saved)
        _check_room(parent, size)
        self.path = (
            Path(tempfile.mkdtemp(prefix="sida-experts-", dir=parent)) / "experts.safetensors"
        )
        # Unbuffered: what a full disk did not take must not fail once more when the file is closed.
        self._file: BinaryIO = self.path.open("w+b", buffering=0)
        self._discard = weakref.finalize(self, _remove, self._file, self.path.parent, os.getpid())
        try:
            self._write(header, len(adapter.layer_names))
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
        """Put equal weights back into the modules, and remove the file.

        Raises:
            OSError: Reading failed. The file is kept, and this may be called again.
        """
        moved = self._saved[: self._moved]
        size = sum(saved.weight.nbytes for saved in moved)
        try:
            with progress_bar("Reading experts back", size) as bar:
                for saved in moved:
                    saved.parameter.replace(_read(self._file, saved).to(saved.device))
                    bar.update(saved.weight.nbytes)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; the experts are still in this file: close the handle again",
                str(self.path),
            ) from error
        self._discard()

    def _write(self, header: bytes, layers: int) -> None:
        write(self._file, header)
        each = len(self._saved) // layers
        size = sum(saved.weight.nbytes for saved in self._saved)
        with progress_bar("Moving experts to a file", size) as bar:
            for layer in range(layers):
                here = self._saved[layer * each : (layer + 1) * each]
                for saved in here:
                    write_tensor(self._file, saved.parameter.weight)
                    bar.update(saved.weight.nbytes)
                for saved in here:
                    weight = saved.weight
                    empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                    saved.parameter.replace(empty)
                    self._moved += 1


def _plan(adapter: ExpertAdapter) -> tuple[bytes, list[_Saved]]:
    """Return how the file begins and what follows."""
    parameters = {
        f"{name}.{parameter.key}": parameter
        for layer, name in enumerate(adapter.layer_names)
        for parameter in adapter.parameters(layer)
    }
    header, begins = make_header({name: found.weight for name, found in parameters.items()})
    return header, [
        _Saved(found, found.weight.detach().to("meta"), found.weight.device, begins[name])
        for name, found in parameters.items()
    ]


def _read(file: BinaryIO, saved: _Saved) -> Tensor:
    weight = torch.empty(saved.weight.shape, dtype=saved.weight.dtype)
    view, begin = memoryview(weight.view(torch.uint8).numpy().data).cast("B"), saved.begin
    while view:
        count = os.preadv(file.fileno(), [view], begin)
        if count == 0:
            raise OSError(errno.EIO, "the file of the experts ends early")
        view, begin = view[count:], begin + count
    return weight


def _remove(file: BinaryIO, folder: Path, process: int) -> None:
    file.close()
    if os.getpid() == process:  # not in one that was forked off
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
