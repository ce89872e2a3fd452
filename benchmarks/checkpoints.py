# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights that benchmarks run, and their files' place in the page cache."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, SwitchTransformersEncoderModel

from sida.cli.random_model import STD, model_layout, switch_base, write_random_model

READ_BYTES = 4 << 20
"""Of one positioned read when the disk's rate is measured."""
THREADS = (1, 2, 4)
EMBEDDINGS = ("shared.weight", "model.embed_tokens.weight")


@contextmanager
def switch_encoder(experts: int) -> Iterator[Path]:
    """Write an encoder of Switch-base's shape in bfloat16 to a temporary folder, on the disk."""
    config = switch_base(experts)
    config.architectures = ["SwitchTransformersEncoderModel"]
    with torch.device("meta"):
        model = SwitchTransformersEncoderModel(config)
    layout = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    with _written(config, layout) as folder:
        yield folder


@contextmanager
def switch_model(experts: int) -> Iterator[Path]:
    """Write an encoder-decoder of Switch-base's shape in bfloat16 to a temporary folder."""
    config = switch_base(experts)
    with _written(config, model_layout(config)) as folder:
        yield folder


@contextmanager
def olmoe(layers: int) -> Iterator[Path]:
    """Write a decoder of OLMoE's shape in bfloat16, of so many layers, to a temporary folder."""
    config = OlmoeConfig(
        architectures=["OlmoeForCausalLM"],
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_experts=64,
        num_experts_per_tok=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    layout = [
        published
        for name, p in model.named_parameters()
        for published in _published(name, tuple(p.shape))
    ]
    with _written(config, layout) as folder:
        yield folder


def _published(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield what checkpoints have in place of a parameter: each expert's projections alone."""
    before, experts, stack = name.partition(".experts.")
    if not experts:
        yield name, shape
        return
    parts = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
    for expert in range(shape[0]):
        for part in parts:
            yield (
                f"{before}.experts.{expert}.{part}.weight",
                (shape[1] // len(parts), shape[2]),
            )


@contextmanager
def _written(config: Any, layout: Any) -> Iterator[Path]:
    with TemporaryDirectory(prefix="sida-benchmark-") as name:
        folder = Path(name)
        for _ in write_random_model(folder, config, layout):
            pass
        _widen_embeddings(folder)
        sync(folder)
        yield folder


def _widen_embeddings(folder: Path) -> None:
    """Give token embeddings a deviation of one, as transformers does, so that tokens differ.

    With small ones all tokens are routed to few experts.
    """
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            place = next((header[name] for name in EMBEDDINGS if name in header), None)
            if place is None:
                continue
            begin, end = (8 + length + offset for offset in place["data_offsets"])
            file.seek(begin)
            values = torch.frombuffer(bytearray(file.read(end - begin)), dtype=torch.bfloat16)
            file.seek(begin)
            file.write((values / STD).view(torch.uint8).numpy().tobytes())
            return
    raise ValueError(f"expected {' or '.join(EMBEDDINGS)} in {folder}, found none")


def sync(folder: Path) -> None:
    """Have a folder's files on the disk: only then can they leave the page cache."""
    for descriptor in _open_all(folder):
        os.fsync(descriptor)


def drop_page_cache(folder: Path) -> None:
    """Make the kernel forget the contents of a folder's files; needs no privileges."""
    for descriptor in _open_all(folder):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read_from_disk() -> int:
    """Return how much this process has had read from disks so far, readahead included."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


class Disk:
    """Measures how fast the disk gives files that are not in the page cache.

    Ranges of an expert's size, in random order, by positioned reads on one, two or four threads:
    through the page cache, without readahead, as sida reads. The fastest number of threads, found
    at the beginning, counts.

    Attributes:
        threads: That many.
        bytes_per_second: What they reached then, at best.
    """

    def __init__(self, folder: Path, range_bytes: int, seed: int = 0) -> None:
        self._folder, self._range_bytes = folder, range_bytes
        self._random = random.Random(seed)
        count = 1 << 29
        rates = {
            threads: max(count / self.seconds_for(count, threads) for _ in range(3))
            for threads in THREADS
        }
        self.threads = max(rates, key=lambda threads: rates[threads])
        self.bytes_per_second = rates[self.threads]

    def seconds_for(self, count: int, threads: int | None = None) -> float:
        """Return how long it takes to read `count` bytes, dropped from the page cache before."""
        drop_page_cache(self._folder)
        ranges = self._ranges(count)
        descriptors = list(_open_all(self._folder, keep=True))
        for descriptor in descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        turn = threading.Lock()

        def read() -> None:
            buffer = memoryview(bytearray(READ_BYTES))
            while True:
                with turn:
                    if not ranges:
                        return
                    file, begin, end = ranges.pop()
                for offset in range(begin, end, READ_BYTES):
                    view = buffer[: min(READ_BYTES, end - offset)]
                    os.preadv(descriptors[file], [view], offset)

        workers = [threading.Thread(target=read) for _ in range(threads or self.threads)]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - begin
        for descriptor in descriptors:
            os.close(descriptor)
        return seconds

    def _ranges(self, count: int) -> list[tuple[int, int, int]]:
        places = [
            (file, begin, begin + self._range_bytes)
            for file, path in enumerate(_files(self._folder))
            for begin in range(0, path.stat().st_size - self._range_bytes + 1, self._range_bytes)
        ]
        chosen = self._random.sample(places, min(len(places), -(-count // self._range_bytes)))
        file, begin, end = chosen[0]
        chosen[0] = (file, begin, end - (len(chosen) * self._range_bytes - count))
        return chosen


def disk_of(folder: Path) -> dict[str, Any]:
    """Say what a folder lies on: file system, device, and what the kernel says of it."""
    number = folder.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    found: dict[str, Any] = {"file_system": None, "device": None}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[2] == name:
            kind, device = fields[fields.index("-") + 1 :][:2]
            found.update(file_system=kind, device=device)
    queue = Path(f"/sys/dev/block/{name}/queue")
    if not queue.exists():
        queue = Path(f"/sys/dev/block/{name}/../queue")
    for key in ("rotational", "read_ahead_kb", "scheduler"):
        if (queue / key).exists():
            found[key] = (queue / key).read_text(encoding="ascii").strip()
    found["total_bytes"] = shutil.disk_usage(folder).total
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _open_all(folder: Path, keep: bool = False) -> Iterable[int]:
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        yield descriptor
        if not keep:
            os.close(descriptor)
