# SPDX-License-Identifier: Apache-2.0
"""The encoder of Switch-base's shape, all experts in memory: sida and plain Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import encoder
import harness
import torch

import sida

SHAPES = ((1, 32), (4, 32), (8, 128))
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def measure_shape(
    ours: Any, theirs: Any, shape: tuple[int, int], repetitions: int
) -> dict[str, Any]:
    """Return times of batches of one shape."""
    batches = encoder.random_batches(repetitions + 1, shape)
    at = 0

    def begin_turn(turn: int) -> None:
        nonlocal at
        at = turn

    return harness.interleave(
        {"sida": lambda: ours(batches[at]), "hugging_face": lambda: theirs(batches[at])},
        repetitions,
        begin_turn,
    )


def measure_dtype(folder: Path, dtype: torch.dtype, repetitions: int) -> dict[str, Any]:
    """Return times of batches of each shape."""
    theirs, model = (encoder.hugging_face(folder, dtype) for _ in range(2))
    with sida.offload(model, memory=1.0):
        return {
            f"{shape[0]} x {shape[1]}": measure_shape(model, theirs, shape, repetitions)
            for shape in SHAPES
        }


def measure(repetitions: int) -> dict[str, Any]:
    """Return times of a batch, by dtype and shape."""
    with checkpoints.switch_encoder(encoder.EXPERTS) as folder:
        seconds = {
            name: measure_dtype(folder, dtype, repetitions) for name, dtype in DTYPES.items()
        }
    return {
        "experts": encoder.EXPERTS,
        "seconds": seconds,
        "targets": [
            harness.target(
                f"all resident, {name}, batch of {shape}, times as fast as Hugging Face",
                times["hugging_face"]["median"] / times["sida"]["median"],
                at_least=1.0,
            )
            for name, shapes in seconds.items()
            for shape, times in shapes.items()
        ],
    }


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    harness.run("encoder_resident", options, lambda: measure(options.repetitions))


if __name__ == "__main__":
    main()
