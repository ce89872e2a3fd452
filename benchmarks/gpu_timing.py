# SPDX-License-Identifier: Apache-2.0
"""What benchmarks on a GPU measure with; without one, so that they can be tried, on the CPU."""

from __future__ import annotations

import gc
import math
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

ANY_SPREAD = math.inf
"""Where the calling thread sets the pace, the clock of a shared host decides how much times vary:
what is held against each other takes turns, and results say how wide the widest spread was."""


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def finished(run: Callable[[], object]) -> float:
    """Return the seconds from a call to the end of its work."""
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def free_memory() -> None:
    """Give back what torch keeps for its next tensors: sida's arena does not come from there."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def link_peak(device: str = "cuda") -> float:
    """Return the bytes a second at which large pinned memory reaches the GPU."""
    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty_like(source, device=device)
    seconds = [finished(lambda: target.copy_(source, non_blocking=True)) for _ in range(8)]
    return len(source) / min(seconds)


def gpu() -> dict[str, Any]:
    """Say which GPU and driver this ran on, and what the clocks were; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    asked = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,pcie.link.gen.current"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    values = said.stdout.splitlines()[torch.cuda.current_device()].split(", ")
    return {**dict(zip(asked.split(","), values, strict=True)), "cuda": torch.version.cuda}
