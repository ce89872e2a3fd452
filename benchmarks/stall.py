# SPDX-License-Identifier: Apache-2.0
"""How much of the exposed stall prediction takes away: the trained model, 20 % of its experts.

The experts come over a link of stated bandwidth, on which bringing what is missed without
prediction takes as long as computing with all experts resident.
"""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import encoder
import harness

import sida
from sida import ExpertStore
from sida.cli.classifier import Classifier, load_encoder
from sida.cli.locate import draw_sentences
from sida.huggingface.adapter import find_adapter
from sida.huggingface.engine import CheckpointExperts, Place
from sida.huggingface.handle import Offloaded
from sida.huggingface.look_ahead import LookAhead
from sida.huggingface.tables import open_tables

MODEL = harness.ROOT / "models" / "wordnet-switch-32"
MEMORY = 0.2
HELD_OUT = 7602
BATCHES = {1: 64, 8: 16}
"""Of one repetition, by sentences in a batch."""


def throttled_encoder(bytes_per_second: float, predictor: Any) -> Offloaded:
    """Return a handle on the trained model whose experts come over a slow link."""
    model = load_encoder(MODEL)
    adapter = find_adapter(model)
    config = adapter.config("f32")
    store = ExpertStore.open(MODEL, layers=adapter.layer_names, dtype="f32", config=config)
    return Offloaded(
        model,
        adapter,
        CheckpointExperts(store.throttled(bytes_per_second=bytes_per_second), Place("cpu")),
        memory=MEMORY,
        routing="exact",
        tables=open_tables(predictor, adapter),
        look_ahead=LookAhead(adapter, wanted=False),
        policy="auto",
        threads=None,
        skip_padding=False,
        device="cpu",
    )


def measure(repetitions: int) -> dict[str, Any]:
    """Return stalls and times of a batch, for batches of each size."""
    sizes = [measure_size(size, repetitions) for size in BATCHES]
    return {
        "memory": MEMORY,
        "sizes": sizes,
        "targets": [target for found in sizes for target in found.pop("targets")],
    }


def measure_size(size: int, repetitions: int) -> dict[str, Any]:
    """Return stalls and times of a batch of `size` sentences."""
    turn_batches = BATCHES[size]
    sentences = draw_sentences(MODEL, min(size * turn_batches * (repetitions + 1), HELD_OUT))
    batches = Classifier(MODEL).batches(sentences, size)
    with (
        TemporaryDirectory() as temporary,
        encoder.sida_encoder(MODEL, memory=MEMORY) as off,
        sida.offload(load_encoder(MODEL), memory=1.0) as resident,
    ):
        list(off.map(batches))
        bytes_moved = off.stats()["bytes_moved"] / len(batches)
        table = off.record(Path(temporary) / "table.safetensors")
        own = harness.summary(
            [encoder.timed(functools.partial(resident.model, **batch)) for batch in batches]
        )
    bandwidth = bytes_moved / own["median"]
    handles = {
        "none": throttled_encoder(bandwidth, None),
        "table": throttled_encoder(bandwidth, table),
        "predictor": throttled_encoder(bandwidth, MODEL / "predictor.safetensors"),
    }
    stalls: dict[str, list[float]] = {name: [] for name in handles}
    moved: dict[str, list[float]] = {name: [] for name in handles}
    part: list[Any] = []

    def begin_turn(turn: int) -> None:
        begin = turn * turn_batches % (len(batches) - turn_batches + 1)
        part[:] = batches[begin : begin + turn_batches]

    def run(name: str) -> float:
        handle = handles[name]
        handle.reset_stats()
        mapped = handle.map(part)
        seconds = encoder.timed(lambda: list(mapped)) / len(part)
        stalls[name].append(handle.stats()["stall_seconds"] / len(part))
        moved[name].append(handle.stats()["bytes_moved"] / len(part))
        return seconds

    times = harness.interleave(
        {name: functools.partial(run, name) for name in handles}, repetitions, begin_turn
    )
    for handle in handles.values():
        handle.close()
    exposed = {name: harness.summary(values[1:]) for name, values in stalls.items()}
    for summary in exposed.values():
        del summary["spread"]  # a stall may be next to nothing
    return {
        "batch": size,
        "batches": len(batches),
        "resident_seconds": own["median"],
        "bytes_per_second": bandwidth,
        "seconds": times,
        "stall_seconds": exposed,
        "bytes_moved": {name: sum(values[1:]) / repetitions for name, values in moved.items()},
        "targets": [
            harness.target(
                f"exposed stall with {what} / without prediction, batches of {size}",
                exposed[name]["median"] / exposed["none"]["median"],
                at_most=limit,
            )
            for name, what, limit in (
                ("table", "the recorded table", 1 / 3),
                ("predictor", "the trained predictor", 1 / 2),
            )
        ],
    }


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    harness.run("stall", options, lambda: measure(options.repetitions))


if __name__ == "__main__":
    main()
