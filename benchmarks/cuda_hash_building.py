# SPDX-License-Identifier: Apache-2.0
"""What building hash tables costs on a GPU: a table by itself, and what `map` loses by it.

Predictors of the size that is trained (hidden size 256), with random weights, for Switch-base-128's
encoder: embeddings of 768 numbers, six layers of 128 experts. In `map` each predictor does its work
and the recorded table is taken in its place, so that all move the same experts and what is left is
the cost of predicting.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import cuda_encoder
import harness
import numpy as np
import torch
from gpu_timing import ANY_SPREAD, finished, gpu
from switch_base import batches_of, make_encoder
from torch import Tensor

import sida
from sida.huggingface.adapter import find_adapter
from sida.torch.architectures import make_network
from sida.torch.predictor import Predictor

KINDS = ("lstm", "causal_lstm", "transformer", "token")
SHAPES = ((1, 128), (8, 128), (32, 128))
EXPERTS, LAYERS, SIZE = 128, 6, 768
MEMORY = 0.2
PLACES = ("cuda", "cpu")


class Costing:
    """A predictor that does its work and says what was recorded."""

    def __init__(self, own: sida.HashPredictor, recorded: sida.HashTable) -> None:
        self.own, self.recorded = own, recorded
        self.device, self.kind, self.heads = own.device, own.kind, own.heads
        self.layers, self.experts, self.fingerprint = own.layers, own.experts, own.fingerprint

    def predict(
        self, embeddings: Tensor, mask: Tensor, *, key: int, candidates: int
    ) -> sida.HashTable:
        """Predict, and return the recorded table."""
        self.own.predict(embeddings, mask, key=key, candidates=candidates)
        found = self.recorded.find(key)
        assert found is not None
        return found


def saved(folder: Path, kind: str, fingerprint: str) -> Path:
    """Write a predictor with random weights; return its path."""
    torch.manual_seed(1)
    network = make_network(kind, SIZE, EXPERTS, LAYERS)
    predictor = Predictor(
        kind, network, layers=LAYERS, heads=list(range(LAYERS)), fingerprint=fingerprint
    )
    predictor.save(folder / kind)
    return folder / kind


def tables(path: Path, shape: tuple[int, int], repetitions: int) -> dict[str, Any]:
    """Time one table of embeddings that lie on the GPU, by where the predictor works."""
    predictors = {place: sida.HashPredictor.load(path, device=place) for place in PLACES}
    batches = [torch.randn(*shape, SIZE, device="cuda") for _ in range(4)]
    at = 0

    def begin_turn(turn: int) -> None:
        nonlocal at
        at = turn % len(batches)

    def build(place: str) -> None:
        given = batches[at] if place == "cuda" else batches[at].cpu()
        predictors[place].predict(given)

    found: dict[str, Any] = harness.interleave(
        {place: functools.partial(build, place) for place in PLACES}, repetitions, begin_turn
    )
    one, other = (predictors[place].predict(batches[0].cpu()) for place in PLACES)
    found["difference"] = float(np.abs(one.probs - other.probs).max())
    found["workspace_bytes"] = predictors["cuda"].workspace_bytes
    return found


def building_seconds(off: sida.Offloaded) -> float:
    """Return the median seconds of building one table in a handle's trace."""
    with tempfile.TemporaryDirectory() as folder:
        off.trace(Path(folder) / "trace")
        events = json.loads((Path(folder) / "trace").read_text(encoding="utf-8"))["traceEvents"]
    names = [event for event in events if event["ph"] == "X"]
    times = [e["dur"] * 1e-6 for e in names if e["cat"].replace(" ", "_") == "hash_building"]
    return float(np.median(times))


def mapped(original: Any, folder: Path, repetitions: int) -> dict[str, Any]:
    """Time `map` with the recorded tables, and with predictors besides."""
    fingerprint = find_adapter(original).fingerprint()
    path = saved(folder, "lstm", fingerprint)
    batches = {shape: batches_of(shape) for shape in SHAPES}
    with sida.offload(copy.deepcopy(original), memory=1.0, device="cuda") as off:
        recorded = cuda_encoder.joined(
            [cuda_encoder.record(off, each) for each in batches.values()]
        )
    sources: dict[str, Any] = {"recorded": recorded}
    sources |= {
        place: Costing(sida.HashPredictor.load(path, device=place), recorded) for place in PLACES
    }
    handles = {
        name: sida.offload(copy.deepcopy(original), memory=MEMORY, device="cuda", predictor=source)
        for name, source in sources.items()
    }
    found = {}
    for shape, part in batches.items():

        def run(name: str, part: list[Tensor]) -> float:
            return finished(lambda: list(handles[name].map(part))) / len(part)

        def begin_turn(turn: int) -> None:
            if turn == 1:
                for off in handles.values():
                    off.reset_stats()

        runs = {name: functools.partial(run, name, part) for name in handles}
        figures: dict[str, Any] = {"seconds": harness.interleave(runs, repetitions, begin_turn)}
        figures["building_seconds"] = {place: building_seconds(handles[place]) for place in PLACES}
        stats = {name: off.stats() for name, off in handles.items()}
        figures["counts"] = {
            name: {key: counted[key] / counted["passes"] for key in ("misses", "bytes_moved")}
            for name, counted in stats.items()
        }
        found[f"{shape[0]}x{shape[1]}"] = figures
    for off in handles.values():
        off.close()
    return found


def measure(repetitions: int) -> dict[str, Any]:
    """Return all figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone = {
            kind: {f"{shape[0]}x{shape[1]}": tables(path, shape, repetitions) for shape in SHAPES}
            for kind in KINDS
            for path in [saved(folder, kind, "")]
        }
        maps = mapped(make_encoder(EXPERTS), folder, repetitions)
    targets = []
    for name, figures in maps.items():
        median = {who: times["median"] for who, times in figures["seconds"].items()}
        targets += [
            harness.target(
                f"{name}, building a table / time of a batch",
                figures["building_seconds"]["cuda"] / median["cuda"],
                at_most=0.10,
            ),
            harness.target(
                f"{name}, map with a predictor / with the recorded table",
                median["cuda"] / median["recorded"],
                at_most=1.03,
            ),
        ]
    return {
        "gpu": gpu(),
        "memory": MEMORY,
        "tables": alone,
        "map": maps,
        "targets": targets,
    }


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    torch.set_grad_enabled(False)
    harness.run(
        "cuda/hash_building", options, lambda: measure(options.repetitions), spread=ANY_SPREAD
    )


if __name__ == "__main__":
    main()
