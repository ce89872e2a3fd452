# SPDX-License-Identifier: Apache-2.0
"""The encoder of Switch-base's shape, 20 % of its experts in memory, its files in the page cache.

Nothing is foretold: what is compared is bringing experts when they are needed.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import checkpoints
import encoder
import harness


def measure(repetitions: int) -> dict[str, Any]:
    """Return times of a batch."""
    batches = encoder.random_batches(repetitions + 1)
    with checkpoints.switch_encoder(encoder.EXPERTS) as folder, TemporaryDirectory() as temporary:
        theirs = encoder.accelerate_encoder(folder, Path(temporary))
        resident = encoder.sida_encoder(folder, memory=1.0)
        ours = encoder.sida_encoder(folder, memory=encoder.MEMORY)
        for batch in batches:
            for model in (theirs, resident.model, ours.model):
                model(batch)
        ours.reset_stats()
        at = 0

        def begin_turn(turn: int) -> None:
            nonlocal at
            at = turn

        times = harness.interleave(
            {
                "resident": lambda: resident.model(batches[at]),
                "none": lambda: ours.model(batches[at]),
                "accelerate": lambda: theirs(batches[at]),
            },
            repetitions,
            begin_turn,
        )
        stats = ours.stats()
        for handle in (resident, ours):
            handle.close()
        return {
            "experts": encoder.EXPERTS,
            "memory": encoder.MEMORY,
            "batch": encoder.BATCH,
            "seconds": times,
            "bytes_moved": stats["bytes_moved"] / stats["passes"],
            "targets": [
                harness.target(
                    "page cache warm, without prediction, times as fast as accelerate",
                    times["accelerate"]["median"] / times["none"]["median"],
                    at_least=3,
                )
            ],
        }


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    harness.run("encoder_warm", options, lambda: measure(options.repetitions))


if __name__ == "__main__":
    main()
