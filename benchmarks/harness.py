# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: a quiet machine, interleaved candidates, results with their origin."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import sida

ROOT = Path(__file__).parents[1]
QUIET_LOAD = 0.5
"""Load of the machine above which nothing is recorded."""


class NotQuietError(RuntimeError):
    """The machine does other work, so that times would say little."""


def wait_until_quiet(seconds: float = 120) -> None:
    """Wait for the machine's load to fall.

    Raises:
        NotQuietError: It did not.
    """
    end = time.monotonic() + seconds
    while os.getloadavg()[0] > QUIET_LOAD:
        if time.monotonic() > end:
            raise NotQuietError(
                f"expected a load of at most {QUIET_LOAD}, got {os.getloadavg()[0]:.2f}: "
                "stop other programs, or wait"
            )
        time.sleep(5)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    repetitions: int = 20,
    prepare: Callable[[int], object] = lambda repetition: None,
) -> dict[str, dict[str, float]]:
    """Time candidates in turns, so that a change of the machine's clock meets all of them.

    Args:
        candidates: What is timed, by name.
        repetitions: Turns; one more goes before and is not counted.
        prepare: Called before each turn, outside the times, with its number.

    Returns:
        For each candidate the median, the minimum, and p90 / p10 of its seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        prepare(repetition)
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            if repetition:
                times[name].append(time.perf_counter() - begin)
    return {name: summary(values) for name, values in times.items()}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, minimum and spread of some times."""
    deciles = statistics.quantiles(seconds, n=10)
    return {
        "median": statistics.median(seconds),
        "minimum": min(seconds),
        "spread": deciles[-1] / deciles[0],
    }


def provenance() -> dict[str, Any]:
    """Say what was measured, on what, and by which command."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "commit": commit.stdout.strip() or None,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "sida": sida.__version__,
        "torch": torch.__version__,
    }


def _cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    by_name = {name.strip(): value.strip() for name, value in fields.items()}
    flags = by_name.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {"model": by_name.get("model name"), "isa": [flag for flag in wanted if flag in flags]}


def write(name: str, results: Mapping[str, Any]) -> Path:
    """Write results to benchmarks/results/NAME.json."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**provenance(), **results}, indent=1) + "\n", encoding="utf-8")
    return path
