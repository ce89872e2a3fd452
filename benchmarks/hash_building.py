# SPDX-License-Identifier: Apache-2.0
"""What building hash tables costs: a share of a batch's time, and what `map` loses by it.

`map` with a predictor is compared with `map` on the very tables that the predictor makes, so that
both move the same experts: the trained model on its held-out sentences, and the encoder of
Switch-base's shape.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import checkpoints
import encoder
import harness
import numpy as np
import torch

import sida
from sida.cli.classifier import Classifier, load_encoder
from sida.cli.locate import draw_sentences
from sida.cli.ways import read_trace

MODEL = harness.ROOT / "models" / "wordnet-switch-32"
MEMORY = 0.2
MAPPED = 8
"""Batches of one `map`."""
STEPS = 20
"""Of training for the random model's predictor: its cost counts, not its quality."""


def predicted_table(
    off: sida.Offloaded, batches: list[Any]
) -> tuple[sida.HashTable, dict[str, float]]:
    """Return the tables that a handle's predictor makes of batches, and the seconds of each."""
    found, seconds = [], []
    for batch in batches:
        begin = time.perf_counter()
        _, table = off._passes.table_of(batch)
        seconds.append(time.perf_counter() - begin)
        found.append(table)
    table = sida.HashTable(
        layers=found[0].layers,
        candidates=found[0].candidates,
        keys=[table.keys[0] for table in found],
        offsets=np.cumsum([0, *(table.tokens for table in found)]).tolist(),
        ids=np.concatenate([table.ids for table in found], axis=1),
        probs=np.concatenate([table.probs for table in found], axis=1),
        scale=np.concatenate([table.scale for table in found], axis=1),
    )
    return table, middle_and_least(seconds[1:])


def middle_and_least(seconds: list[float]) -> dict[str, float]:
    """Return what is kept of measured times."""
    return {"median": float(np.median(seconds)), "minimum": min(seconds)}


def compare(
    open_handle: Callable[[Any], sida.Offloaded],
    predictor: Any,
    batches: list[Any],
    repetitions: int,
) -> dict[str, Any]:
    """Return times of a batch with a predictor and with its tables, and of building a table."""
    predicting = open_handle(predictor)
    table, alone = predicted_table(predicting, batches)
    recorded = open_handle(table)
    handles = {"predictor": predicting, "table": recorded}
    part: list[Any] = []

    def begin_turn(turn: int) -> None:
        begin = turn * MAPPED % len(batches)
        part[:] = batches[begin : begin + MAPPED]
        if turn == 1:
            for handle in handles.values():
                handle.reset_stats()

    def run(name: str) -> float:
        mapped = handles[name].map(part)
        return encoder.timed(lambda: list(mapped)) / MAPPED

    times = harness.interleave(
        {name: functools.partial(run, name) for name in handles}, repetitions, begin_turn
    )
    building = [
        event["dur"] * 1e-6
        for event in read_trace(predicting)
        if event["cat"].replace(" ", "_") == "hash_building"
    ]
    stats = {name: handle.stats() for name, handle in handles.items()}
    for handle in handles.values():
        handle.close()
    keys = ("hits", "late", "misses", "bytes_moved", "stall_seconds")
    return {
        "seconds": times,
        "building_seconds": alone,
        "building_beside_seconds": middle_and_least(building),
        "counts": {
            name: {key: counted[key] / counted["passes"] for key in keys}
            for name, counted in stats.items()
        },
    }


def trained_model(repetitions: int) -> dict[str, Any]:
    """Compare on the committed model and 256 of its sentences, 8 at a time."""
    batches = Classifier(MODEL).batches(draw_sentences(MODEL, 8 * MAPPED * 4), 8)

    def open_handle(predictor: Any) -> sida.Offloaded:
        return encoder.sida_encoder(MODEL, memory=MEMORY, predictor=predictor)

    return compare(open_handle, MODEL / "predictor.safetensors", batches, repetitions)


def switch_base(repetitions: int) -> dict[str, Any]:
    """Compare on random weights, 4 x 32 tokens at a time."""
    with checkpoints.switch_encoder(encoder.EXPERTS) as folder, TemporaryDirectory() as temporary:
        batches = [{"input_ids": ids} for ids in encoder.random_batches(2 * MAPPED)]
        path = Path(temporary) / "predictor.safetensors"
        with torch.enable_grad():
            model = load_encoder(folder)
            sida.train_predictor(model, batches[:2], steps=STEPS).save(path)
        del model

        def open_handle(predictor: Any) -> sida.Offloaded:
            return encoder.sida_encoder(folder, memory=MEMORY, predictor=predictor)

        return compare(open_handle, path, batches, repetitions)


def measure(repetitions: int) -> dict[str, Any]:
    """Return both models' figures."""
    found = {
        "wordnet-switch-32": trained_model(repetitions),
        "Switch-base shape": switch_base(repetitions),
    }
    targets = []
    for name, model in found.items():
        median = model["seconds"]["predictor"]["median"]
        targets += [
            harness.target(
                f"{name}, building a table / time of a batch",
                model["building_seconds"]["median"] / median,
                at_most=0.10,
            ),
            harness.target(
                f"{name}, map with a predictor / with its tables",
                median / model["seconds"]["table"]["median"],
                at_most=1.03,
            ),
        ]
    return {"memory": MEMORY, "models": found, "targets": targets}


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    harness.run("hash_building", options, lambda: measure(options.repetitions))


if __name__ == "__main__":
    main()
