# SPDX-License-Identifier: Apache-2.0
"""An encoder of Switch-base's shape from disk, 20 % of its experts in memory, page cache cold.

The page cache is dropped before each batch, outside its time. sida's `map` fetches ahead also while
that lasts: what it had read meanwhile is charged, at the disk's rate.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import checkpoints
import encoder
import harness

MAPPED = 4
"""Batches of one `map`."""


def measure(repetitions: int) -> dict[str, Any]:
    """Return times of a batch, bytes read, and what the disk gives."""
    batches = encoder.random_batches(repetitions + MAPPED)
    with checkpoints.switch_encoder(encoder.EXPERTS) as folder, TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        table = encoder.recorded_table(folder, batches, scratch / "table.safetensors")
        theirs = encoder.accelerate_encoder(folder, scratch / "accelerate")
        resident = encoder.sida_encoder(folder, memory=1.0)
        foretold = encoder.sida_encoder(folder, memory=encoder.MEMORY, predictor=table)
        plain = encoder.sida_encoder(folder, memory=encoder.MEMORY)
        for batch in batches:
            resident.model(batch)
        disk = checkpoints.Disk(folder, foretold.stats()["slot_bytes"])
        moved: list[float] = []
        read: dict[str, list[int]] = {"table": [], "none": [], "accelerate": []}
        at = 0

        def drop() -> None:
            checkpoints.drop_page_cache(folder)
            checkpoints.drop_page_cache(scratch)

        def begin_turn(turn: int) -> None:
            nonlocal at
            at = turn
            if turn == 1:
                plain.reset_stats()

        dropping: dict[str, float] = {}

        def cold(model: Any, batch: Any) -> Any:
            before = checkpoints.bytes_read_from_disk()
            dropping["seconds"] += encoder.timed(drop)
            dropping["bytes"] += checkpoints.bytes_read_from_disk() - before
            return model(batch)

        def run_table() -> float:
            dropping.update(seconds=0.0, bytes=0.0)
            foretold.reset_stats()
            before = checkpoints.bytes_read_from_disk()
            mapped = foretold.map(batches[at : at + MAPPED], cold)
            seconds = encoder.timed(lambda: list(mapped))
            moved.append(foretold.stats()["bytes_moved"] / MAPPED)
            read["table"].append((checkpoints.bytes_read_from_disk() - before) // MAPPED)
            charged = dropping["bytes"] / disk.bytes_per_second
            return (seconds - dropping["seconds"] + charged) / MAPPED

        def run_model(name: str, model: Any) -> float:
            drop()
            before = checkpoints.bytes_read_from_disk()
            seconds = encoder.timed(lambda: model(batches[at]))
            read[name].append(checkpoints.bytes_read_from_disk() - before)
            return seconds

        times = harness.interleave(
            {
                "resident": lambda: encoder.timed(lambda: resident.model(batches[at])),
                "table": run_table,
                "disk": lambda: disk.seconds_for(int(moved[-1])),
                "none": lambda: run_model("none", plain.model),
                "accelerate": lambda: run_model("accelerate", theirs),
            },
            repetitions,
            begin_turn,
        )
        stats = plain.stats()
        for handle in (resident, foretold, plain):
            handle.close()
        bytes_moved = statistics.mean(moved[1:])
        if statistics.mean(read["table"][1:]) < 0.95 * bytes_moved:
            raise RuntimeError(f"the page cache of {folder} could not be dropped: choose TMPDIR")
        bound = max(times["resident"]["median"], times["disk"]["median"])
        return {
            "experts": encoder.EXPERTS,
            "memory": encoder.MEMORY,
            "batch": encoder.BATCH,
            "disk": {
                **checkpoints.disk_of(folder),
                "threads": disk.threads,
                "bytes_per_second": bytes_moved / times["disk"]["median"],
                "bytes_per_second_best": bytes_moved / times["disk"]["minimum"],
            },
            "seconds": times,
            "bytes_moved": {
                "table": bytes_moved,
                "none": stats["bytes_moved"] / stats["passes"],
            },
            "bytes_read_from_disk": {
                name: statistics.mean(values[1:]) for name, values in read.items()
            },
            "bound_seconds": bound,
            "targets": [
                harness.target(
                    "from disk, recorded table, time / bound",
                    times["table"]["median"] / bound,
                    at_most=1.15,
                ),
                harness.target(
                    "from disk, without prediction, times as fast as accelerate",
                    times["accelerate"]["median"] / times["none"]["median"],
                    at_least=1.5,
                ),
            ],
        }


def main() -> None:
    """Run the command line."""
    options: argparse.Namespace = harness.arguments(__doc__).parse_args()
    # A virtual disk's own rate varies.
    harness.run("encoder_cold", options, lambda: measure(options.repetitions), spread=2)


if __name__ == "__main__":
    main()
