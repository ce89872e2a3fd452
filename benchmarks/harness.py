# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: a quiet machine, interleaved candidates, results with their origin.

What is compared runs in one process, in turns, on new inputs in each. A benchmark is a function
that returns results; `run` waits for a quiet machine, calls it, and writes what it returned unless
other programs disturbed it. One that counts and times nothing is recorded on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import sida

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUIET_LOAD = 0.5
"""Processors that other programs may keep busy while something is recorded."""
STEADY_SPREAD = 1.5
"""p90 / p10 of a candidate's times above which nothing is recorded, where no other is given."""
SAMPLES, SAMPLE_SECONDS = 40, 0.05
TICK = 1 / os.sysconf("SC_CLK_TCK")


class NotQuietError(RuntimeError):
    """The machine does other work, so that times would say little."""


class Others:
    """Processors that other programs kept busy since this was made."""

    def __init__(self) -> None:
        self._began = (time.monotonic(), _busy_seconds(), _own_seconds())

    def load(self) -> float:
        """Return how many on average."""
        began, busy, own = self._began
        others = (_busy_seconds() - busy) - (_own_seconds() - own)
        return max(0.0, others) / (time.monotonic() - began)


_since_quiet: Others | None = None


def wait_until_quiet(seconds: float = 120) -> None:
    """Wait until the machine's load is low: what runs or waits for a disk, this process left out.

    The load is taken over two seconds; the kernel's average remembers the benchmark before.

    Raises:
        NotQuietError: It stayed high.
    """
    global _since_quiet
    end = time.monotonic() + seconds
    while (load := _load()) > QUIET_LOAD:
        if time.monotonic() > end:
            raise NotQuietError(
                f"expected a load of at most {QUIET_LOAD}, got {load:.2f}: "
                "stop other programs, or wait"
            )
    _since_quiet = Others()


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    repetitions: int = 20,
    prepare: Callable[[int], object] = lambda repetition: None,
) -> dict[str, dict[str, float]]:
    """Time candidates in turns, so that a change of the machine's clock meets all of them.

    Args:
        candidates: What is timed, by name. One that returns a float says itself how many seconds
            it took.
        repetitions: Turns; one more goes before and is not counted.
        prepare: Called before each turn, outside the times, with its number.

    Returns:
        For each candidate the median, the minimum, and p90 / p10 of its seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        prepare(repetition)
        for name, run_candidate in candidates.items():
            begin = time.perf_counter()
            own = run_candidate()
            seconds = time.perf_counter() - begin
            if repetition:
                times[name].append(own if isinstance(own, float) else seconds)
    return {name: summary(values) for name, values in times.items()}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, minimum and spread of some times."""
    deciles = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else seconds
    return {
        "median": statistics.median(seconds),
        "minimum": min(seconds),
        "spread": deciles[-1] / deciles[0],
        "repetitions": len(seconds),
    }


def target(
    what: str, figure: float, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """Return a figure that was promised, its limit, and whether it is kept."""
    met = figure <= at_most if at_most is not None else figure >= (at_least or 0)
    limit = {"at_most": at_most} if at_most is not None else {"at_least": at_least}
    return {"what": what, "figure": figure, **limit, "met": met}


def arguments(description: str | None, repetitions: int = 20) -> argparse.ArgumentParser:
    """Return the options of every benchmark; `repetitions` where none are asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--anyway", action="store_true", help="on a busy machine too; prints, writes nothing"
    )
    turns = f"turns (default: {repetitions})"
    parser.add_argument("--repetitions", type=int, default=repetitions, help=turns)
    return parser


def run(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[], Mapping[str, Any]],
    *,
    timed: bool = True,
    spread: float = STEADY_SPREAD,
) -> None:
    """Measure and write benchmarks/results/NAME.json; with --anyway print and write nothing.

    Args:
        name: Of the benchmark.
        options: As `arguments` gives them.
        measure: Returns the results.
        timed: Whether there are times among them, which a busy machine would change.
        spread: p90 / p10 above which nothing is recorded; what is above the usual is recorded with
            the results, for reasons that the benchmark gives.
    """
    if timed and not options.anyway:
        wait_until_quiet()
    results = measure()
    for kept in results.get("targets", []):
        relation = "<=" if "at_most" in kept else ">="
        limit = kept.get("at_most", kept.get("at_least"))
        mark = "ok    " if kept["met"] else "MISSED"
        print(f"{mark} {kept['what']}: {kept['figure']:.4g} ({relation} {limit:.4g})")
    if options.anyway:
        print(json.dumps(results, indent=1))
    else:
        try:
            origin = {**provenance(), **(quietness(results, spread) if timed else {})}
        except NotQuietError:
            print(json.dumps(results, indent=1))  # to be seen, though not to be kept
            raise
        print(write(name, {**origin, **results}))


def write(name: str, content: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def quietness(results: Mapping[str, Any], spread: float) -> dict[str, Any]:
    """Say how many processors other programs kept busy while the results were measured.

    Raises:
        NotQuietError: Other programs were at work since `wait_until_quiet`, or times vary much.
    """
    if _since_quiet is None:
        raise NotQuietError("not recorded: wait_until_quiet() was not called")
    load = _since_quiet.load()
    if load > QUIET_LOAD:
        raise NotQuietError(
            f"not recorded: other programs kept {load:.2f} processors busy meanwhile, expected at "
            f"most {QUIET_LOAD}"
        )
    spreads = list(_spreads(results))
    unsteady = [f"{place}: {found:.2f}" for place, found in spreads if found > spread]
    if unsteady:
        raise NotQuietError(
            f"not recorded: expected p90 / p10 of at most {spread}, got " + ", ".join(unsteady)
        )
    widest = max((found for _, found in spreads), default=1.0)
    return {"load_of_others": round(load, 3), "widest_spread": round(widest, 2)}


def provenance() -> dict[str, Any]:
    """Say what was measured, on what, and by which command.

    Where the sources are a copy without git, SIDA_COMMIT names the commit.
    """
    import accelerate
    import transformers

    return {
        "commit": _commit() or os.environ.get("SIDA_COMMIT"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        "sida": sida.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def _commit() -> str:
    """The commit of the sources, "-dirty" if they differ; what was recorded and its pages aside."""
    commit = _git("rev-parse", "--short", "HEAD")
    sources = (".", ":!benchmarks/results", ":!docs", ":!README.md")
    return commit + "-dirty" if _git("status", "--porcelain", "--", *sources) else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    by_name = {name.strip(): value.strip() for name, value in fields.items()}
    flags = by_name.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {"model": by_name.get("model name"), "isa": [flag for flag in wanted if flag in flags]}


def _load() -> float:
    samples = []
    for _ in range(SAMPLES):
        time.sleep(SAMPLE_SECONDS)
        fields = dict(line.split()[:2] for line in _stat())
        samples.append(int(fields["procs_running"]) - 1 + int(fields["procs_blocked"]))
    return statistics.mean(samples)


def _busy_seconds() -> float:
    user, nice, system, _, _, irq, softirq = (int(field) for field in _stat()[0].split()[1:8])
    return (user + nice + system + irq + softirq) * TICK


def _own_seconds() -> float:
    return sum(os.times()[:4])


def _stat() -> list[str]:
    return Path("/proc/stat").read_text(encoding="ascii").splitlines()


def _spreads(results: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(results, Mapping):
        for name, value in results.items():
            if name == "spread":
                yield place, value
            else:
                yield from _spreads(value, f"{place}.{name}" if place else name)
    elif isinstance(results, list):
        for index, value in enumerate(results):
            yield from _spreads(value, f"{place}[{index}]")
