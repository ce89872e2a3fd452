# SPDX-License-Identifier: Apache-2.0
"""Runs benchmarks, each in a process of its own, and writes docs/performance.md from their results.

Behind scripts/benchmark.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import harness
import report

BENCHMARKS = (
    "expert_layer",
    "encoder_resident",
    "encoder_warm",
    "encoder_cold",
    "decoder_disk",
    "peak_memory",
    "cache_lookup",
    "hash_building",
    "bytes_moved",
    "decoder_routing",
    "stall",
)
TRIES = 2
"""Runs of a benchmark, at most, until one is recorded."""


def run(name: str, options: list[str]) -> bool:
    """Run one benchmark, again if other programs disturbed it; return whether it came to an end."""
    command = [sys.executable, str(harness.ROOT / "benchmarks" / f"{name}.py"), *options]
    for attempt in range(1, TRIES + 1):
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        print(f"   {time.monotonic() - begin:.0f} s", flush=True)
        if done.returncode == 0:
            return True
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        disturbed = "NotQuietError" in lines[-1]
        print("\n".join(lines[-1:] if disturbed else lines), file=sys.stderr, flush=True)
        if not disturbed:
            return False
        print(f"   attempt {attempt} of {TRIES} was not recorded", file=sys.stderr, flush=True)
    return False


def main() -> int:
    """Run the command line; return 0 if all benchmarks came to an end."""
    present = [name for name in BENCHMARKS if _exists(name)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(present))
    parser.add_argument("--report", action="store_true", help="run nothing, only write the report")
    parser.add_argument("--anyway", action="store_true", help="record nothing, on any machine")
    parser.add_argument("--repetitions", type=int, help="turns of each (default: theirs)")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(present))
    if unknown:
        parser.error(f"expected names among {', '.join(present)}; got {', '.join(unknown)}")
    failed = []
    if not options.report:
        passed_on = ["--anyway"] if options.anyway else []
        if options.repetitions is not None:
            passed_on += ["--repetitions", str(options.repetitions)]
        failed = [name for name in options.names or present if not run(name, passed_on)]
    if not options.anyway:
        report.write_all()
    if failed:
        print(f"not recorded: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _exists(name: str) -> bool:
    return (harness.ROOT / "benchmarks" / f"{name}.py").exists()


if __name__ == "__main__":
    sys.exit(main())
