# SPDX-License-Identifier: Apache-2.0
"""What the encoder benchmarks share: its batches, and the ways of running it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import torch
from accelerate import disk_offload
from torch import Tensor
from transformers import SwitchTransformersEncoderModel

import sida
from sida.cli.classifier import be_quiet

EXPERTS = 32
MEMORY = 0.2
BATCH = (4, 32)
"""Sentences, and tokens of each."""

be_quiet()
torch.set_grad_enabled(False)


def random_batches(count: int, shape: tuple[int, int] = BATCH, seed: int = 0) -> list[Tensor]:
    """Return token ids, so many batches of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 32000, shape, generator=generator) for _ in range(count)]


def hugging_face(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """Return the model as transformers loads it."""
    model = SwitchTransformersEncoderModel.from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():
        # transformers maps the file, and pages that are mapped cannot leave the page cache
        parameter.data = parameter.data.clone()
    return model


def sida_encoder(folder: Path, **options: Any) -> sida.Offloaded:
    """Return a handle on the encoder."""
    off = sida.from_pretrained(folder, **options)
    off.model.eval()
    return off


def accelerate_encoder(folder: Path, offloaded: Path) -> Any:
    """Return the model with its experts on disk, brought by accelerate's hooks.

    Its best setting: everything else stays in memory, and only experts that run are read.
    """
    model = hugging_face(folder)
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            disk_offload(module, str(offloaded / name), execution_device=torch.device("cpu"))
    checkpoints.sync(offloaded)
    return model


def recorded_table(folder: Path, batches: list[Tensor], path: Path) -> sida.HashTable:
    """Return the routing of batches, as a perfect predictor would foretell it."""
    with sida_encoder(folder, memory=MEMORY) as off:
        for batch in batches:
            off.model(batch)
        return off.record(path)


def timed(run: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
