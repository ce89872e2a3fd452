# SPDX-License-Identifier: Apache-2.0
"""Switch Transformers of the published sizes with random weights, written without holding them."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from sida import ExpertStore, MoeConfig
from sida.cli.classifier import be_quiet
from sida.huggingface import from_pretrained

BF16_BYTES = 2
BF16_ONE = 0x3F80
SHARD_BYTES = 1 << 30
POOL = 1 << 24
"""Random values that all weights are cut from."""
STD = 0.02

Layout = list[tuple[str, tuple[int, ...]]]
"""Name and shape of each tensor."""


@dataclass(frozen=True)
class ScaleRun:
    """What running a large model took; bytes of resident memory, and seconds."""

    before_bytes: int
    """With Python, torch and transformers, before the model."""
    loaded_bytes: int
    """After `from_pretrained`."""
    peak_bytes: int
    """The most there ever was."""
    load_seconds: float
    batch_seconds: list[float]
    tokens: int
    """Read by the encoder in a batch."""
    stats: dict[str, Any]


def switch_base(experts: int) -> SwitchTransformersConfig:
    """Return the config of switch-base with this many experts a layer."""
    return SwitchTransformersConfig(
        architectures=["SwitchTransformersForConditionalGeneration"],
        d_model=768,
        d_ff=3072,
        d_kv=64,
        num_heads=12,
        num_layers=12,
        num_decoder_layers=12,
        num_sparse_encoder_layers=6,
        num_sparse_decoder_layers=6,
        num_experts=experts,
        expert_capacity=64,
        vocab_size=32128,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
        dtype="bfloat16",
    )


def model_layout(config: SwitchTransformersConfig) -> Layout:
    """Return name and shape of every tensor of a model, making none of them."""
    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(config)
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def layout_bytes(layout: Layout) -> int:
    """Return what the tensors take in bfloat16."""
    return sum(_bytes(shape) for _, shape in layout)


def check_memory(config: SwitchTransformersConfig, memory: str) -> None:
    """Raise ValueError unless a budget can be right for a model, before the model exists."""
    up = torch.empty(config.d_ff, config.d_model, dtype=torch.bfloat16)  # never touched: no memory
    down = torch.empty(config.d_model, config.d_ff, dtype=torch.bfloat16)
    shape = MoeConfig(
        layers=config.num_sparse_encoder_layers + config.num_sparse_decoder_layers,
        experts=config.num_experts,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        dtype="bf16",
    )
    layer = [(up, down, None, None)] * shape.experts
    ExpertStore.from_arrays(shape, [layer] * shape.layers).slots(memory)


def write_random_model(
    folder: Path, config: SwitchTransformersConfig, layout: Layout, seed: int = 0
) -> Generator[None, None, int]:
    """Write a checkpoint in bfloat16, sharded, and return its size; yields after each shard.

    Holds 32 MiB of random values, of which every weight is a piece; norms are one.

    Args:
        folder: An empty folder.
        config: The model's.
        layout: The model's, from `model_layout`.
        seed: Of the random values.
    """
    draw = np.random.default_rng(seed)
    values = (STD * draw.standard_normal(POOL, dtype=np.float32)).view(np.uint32)
    pool = (values >> 16).astype("<u2")
    shards = list(_shards(layout))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update({tensor: name for tensor, _ in shard})
        with (folder / name).open("wb") as file:
            _write_header(file, shard)
            for tensor, shape in shard:
                _write_tensor(file, tensor, shape, pool, draw)
        yield
    size = layout_bytes(layout)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    return size


def shard_count(layout: Layout) -> int:
    """Return how many files `write_random_model` writes weights into."""
    return len(list(_shards(layout)))


def run_random_model(
    folder: Path, memory: str, batches: int, seed: int = 0
) -> Generator[None, None, ScaleRun]:
    """Load a checkpoint within a budget and run random tokens through encoder and decoder.

    Yields after loading and after each batch.

    Args:
        folder: From `write_random_model`.
        memory: What experts may take.
        batches: Of 8 texts of 64 tokens, with 8 tokens in the decoder.
        seed: Of the tokens.
    """
    be_quiet()
    generator = torch.Generator().manual_seed(seed)
    before, started = resident_bytes(), time.perf_counter()
    with from_pretrained(folder, memory=memory) as off:
        off.model.eval()
        load_seconds, loaded = time.perf_counter() - started, resident_bytes()
        seconds = []
        for _ in range(batches):
            yield
            tokens = torch.randint(1, 32000, (8, 64), generator=generator)
            answer = torch.randint(1, 32000, (8, 8), generator=generator)
            started = time.perf_counter()
            for _ in off.map([{"input_ids": tokens, "decoder_input_ids": answer}]):
                pass
            seconds.append(time.perf_counter() - started)
        stats = dict(off.stats())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return ScaleRun(before, loaded, peak, load_seconds, seconds, 8 * 64, stats)


def resident_bytes() -> int:
    """Return how much memory this process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _bytes(shape: tuple[int, ...]) -> int:
    return BF16_BYTES * int(np.prod(shape))


def _shards(layout: Layout) -> Iterator[Layout]:
    shard: Layout = []
    for name, shape in layout:
        if shard and layout_bytes(shard) + _bytes(shape) > SHARD_BYTES:
            yield shard
            shard = []
        shard.append((name, shape))
    yield shard


def _write_header(file: BinaryIO, shard: Layout) -> None:
    header, begin = {}, 0
    for name, shape in shard:
        end = begin + _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(
    file: BinaryIO,
    name: str,
    shape: tuple[int, ...],
    pool: np.ndarray[Any, np.dtype[np.uint16]],
    draw: np.random.Generator,
) -> None:
    left = int(np.prod(shape))
    if "norm" in name:
        file.write(np.full(left, BF16_ONE, "<u2").tobytes())
        return
    while left:
        begin = int(draw.integers(0, len(pool) // 2))
        piece = pool[begin : begin + left]
        file.write(piece.tobytes())
        left -= len(piece)
