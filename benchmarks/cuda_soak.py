# SPDX-License-Identifier: Apache-2.0
"""Random work on a GPU for a given time, from the first seed that was not run yet.

Runs `soak_cuda` and adds the run to the JSON, which is to be committed: seeds add up over runs. A
run that fails is added too, with the seed that failed and how to repeat it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = 4
"""The program's exit status without one."""
RECORDED = ROOT / "benchmarks" / "results" / "cuda" / "soak.json"


def read_runs(*paths: Path) -> list[dict[str, Any]]:
    """Return the runs of the first of the files that is there."""
    for path in paths:
        if path.exists():
            runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
            return runs
    return []


def next_seed(runs: list[dict[str, Any]]) -> int:
    """Return the first seed behind those that were run."""
    return max((run["first_seed"] + run["seeds"] for run in runs), default=1)


def made_on() -> dict[str, str]:
    """Say which GPU, driver, compiler and commit a run is of; without git SIDA_COMMIT names it."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    device, _, driver = _said(asked).splitlines()[0].partition(", ")
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = _said(head, os.environ.get("SIDA_COMMIT", "unknown"))
    toolkit = _said(["nvcc", "--version"]).splitlines()[-1]
    return {"device": device, "driver": driver, "commit": commit, "toolkit": toolkit}


def _said(command: list[str], otherwise: str = "unknown") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return otherwise
    return done.stdout.strip()


def run(program: str, first_seed: int, seconds: float) -> dict[str, Any]:
    """Run the program; return what it did, or where it failed."""
    command = [program, "--first-seed", str(first_seed), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode == NO_GPU:
        raise SystemExit("there is no GPU")
    did: dict[str, Any] = {"first_seed": first_seed, "seeds": 0, "right_passes": 0}
    if done.stdout:  # else it hung, or was killed
        did = json.loads(done.stdout)
    if done.returncode != 0:
        did["failed"] = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"command": " ".join([Path(program).name, *command[1:]]), **did}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all runs, and what they add up to."""
    totals = {name: sum(run[name] for run in runs) for name in ("seeds", "right_passes")}
    seconds = round(sum(run.get("seconds", 0) for run in runs), 1)
    failed = sum("failed" in run for run in runs)
    return {"totals": {**totals, "seconds": seconds, "failed_runs": failed}, "runs": runs}


def main() -> int:
    """Run the command line; return 0 if no seed failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", default=str(ROOT / "build/gpu/tests/soak/soak_cuda"))
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--json", type=Path, default=RECORDED, help="where runs add up")
    options = parser.parse_args()
    runs = read_runs(options.json, RECORDED)
    done = run(options.program, next_seed(runs), options.seconds)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    runs.append({"date": date, **made_on(), **done})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(summary(runs), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(runs)["totals"]))
    return 1 if "failed" in done else 0


if __name__ == "__main__":
    raise SystemExit(main())
