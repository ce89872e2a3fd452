# SPDX-License-Identifier: Apache-2.0
"""The GPU's memory that an offloaded encoder takes, asked for each millisecond.

Switch-base's encoder with random weights in bfloat16. Counted is what comes on top of the context,
one matmul of torch's and one call of the kernels that are used. The limit is the weights that are
no experts, the budget, what the same model with everything resident takes beside its weights (as
torch's allocator reserves it), and 256 MiB.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import harness
import torch
from cuda_encoder import SHARES
from gpu_timing import gpu, wait
from switch_base import batches_of, make_encoder

import sida

SLACK = 256 << 20
SHAPES = ((1, 128), (32, 128))


def used() -> int:
    """Return the bytes of the GPU's memory that are taken, whoever took them."""
    free, total = torch.cuda.mem_get_info()
    return total - free


class Peak(threading.Thread):
    """Asks each millisecond how much memory is taken, until it is left.

    Attributes:
        most: Bytes.
        samples: How often it asked.
        longest_gap: Seconds between two times, at most.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.samples, self.longest_gap = 0, 0, 0.0
        self._over = threading.Event()

    def run(self) -> None:
        """Ask until the end."""
        last = time.perf_counter()
        while not self._over.wait(0.001):
            self.most = max(self.most, used())
            now = time.perf_counter()
            self.samples += 1
            self.longest_gap, last = max(self.longest_gap, now - last), now

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def bytes_of(model: Any, *, experts: bool) -> int:
    """Return the bytes of the weights that are experts', or of those that are not."""
    return sum(
        value.numel() * value.element_size()
        for name, value in model.named_parameters()
        if (".experts." in name) == experts
    )


def beside_weights(model: Any, batches: list[Any]) -> int:
    """Return what the model takes beside its weights with everything resident."""
    weights = bytes_of(model, experts=True) + bytes_of(model, experts=False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    wait()
    return torch.cuda.max_memory_reserved() - weights


def call_each_kernel(model: Any, batch: Any) -> None:
    """Have everything loaded that the GPU keeps for kernels."""
    with sida.offload(model, memory=0.5, device="cuda") as off, torch.inference_mode():
        off.model(batch)
        wait()


def measure(experts: int, share: float, shape: tuple[int, int]) -> dict[str, Any]:
    """Return one budget's figures, in bytes."""
    batches = batches_of(shape)
    model = make_encoder(experts)
    extra = beside_weights(model, batches)
    others, all_experts = bytes_of(model, experts=False), bytes_of(model, experts=True)
    call_each_kernel(model.to("cpu"), batches[0])
    del model
    torch.cuda.empty_cache()
    before = used()
    model = make_encoder(experts).to("cpu")
    torch.cuda.empty_cache()
    with Peak() as peak:
        off = sida.offload(model, memory=share, device="cuda")
        budget = off.stats()["budget_bytes"]
        with torch.inference_mode():
            for batch in batches:
                off.model(batch)
        wait()
        off.close()
    limit = others + budget + extra + SLACK
    taken = peak.most - before
    return {
        "experts": experts,
        "share": share,
        "shape": shape,
        "expert_bytes": all_experts,
        "other_bytes": others,
        "budget_bytes": budget,
        "beside_weights_bytes": extra,
        "taken_bytes": taken,
        "limit_bytes": limit,
        "kept": taken <= limit,
        "samples": peak.samples,
        "longest_gap_seconds": peak.longest_gap,
    }


def main() -> int:
    """Run the command line; return 0 if no limit was passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--json", type=Path, default=harness.RESULTS / "cuda" / "memory.json")
    options = parser.parse_args()
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    runs = []
    for shape in SHAPES:
        for share in SHARES:
            runs.append(measure(options.experts, share, shape))
            content = {**harness.provenance(), "gpu": gpu(), "runs": runs}
            # Written each time: what is done is not lost.
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(runs[-1]), flush=True)
    return 0 if all(run["kept"] for run in runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
