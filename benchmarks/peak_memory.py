# SPDX-License-Identifier: Apache-2.0
"""The most memory that loading and running a model takes: 8 GiB of experts, 256 MiB for them.

Each time in a process of its own; what its imports took is not counted. The page cache is the
system's, not the process's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import harness
import torch

EXPERTS = 76
"""In each of 12 layers: 8.0 GiB."""
BUDGET = 256 << 20
ALLOWED = 300 << 20
BATCH = (8, 64)
MIB = 1 << 20


def child(folder: Path) -> None:
    """Load, run a batch, and print what it took."""
    import transformers

    import sida
    from sida.cli.classifier import be_quiet
    from sida.huggingface import from_pretrained

    be_quiet()
    assert transformers.SwitchTransformersForConditionalGeneration
    before = _status("VmHWM")
    with from_pretrained(folder, memory=BUDGET) as off, torch.no_grad():
        off.model.eval()
        loaded = _status("VmHWM")
        tokens = torch.randint(1, 32000, BATCH)
        off.model(input_ids=tokens, decoder_input_ids=tokens[:, :8])
        peak = _status("VmHWM")
        stats = off.stats()
        # what is shared between layers counts once
        unique = {p.data_ptr(): p.numel() * p.element_size() for p in off.model.parameters()}
    print(
        json.dumps(
            {
                "imports": before,
                "loading": loaded - before,
                "peak": peak - before,
                "other_weights": sum(unique.values()),
                "all_experts": stats["total_experts"] * stats["slot_bytes"],
                "bytes_moved": stats["bytes_moved"],
                "sida": sida.__version__,
            }
        )
    )


def measure(repetitions: int) -> dict[str, Any]:
    """Return what processes took."""
    runs = []
    with checkpoints.switch_model(EXPERTS) as folder:
        for _ in range(repetitions):
            command = [sys.executable, __file__, "--child", str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output))
    worst = max(runs, key=lambda run: run["peak"])
    limit = worst["other_weights"] + BUDGET + ALLOWED
    return {
        "budget_bytes": BUDGET,
        "batch": BATCH,
        "runs": runs,
        "targets": [
            harness.target(
                "peak above the imports, MiB", worst["peak"] / MIB, at_most=round(limit / MIB)
            )
        ],
    }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status says nothing of {name}")


def main() -> None:
    """Run the command line."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
    else:
        processes = min(options.repetitions, 3)  # a peak hardly varies
        harness.run("peak_memory", options, lambda: measure(processes))


if __name__ == "__main__":
    main()
