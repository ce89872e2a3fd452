# SPDX-License-Identifier: Apache-2.0
"""Leasing a resident expert and giving it back, alone and while another thread inserts experts."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import harness

BUILD = harness.ROOT / "build" / "benchmarks"


def build() -> None:
    """Compile cache_lookup.cpp."""
    options = ("BENCHMARKS=ON", "TESTS=OFF", "EXAMPLES=OFF", "PYTHON=OFF")
    subprocess.run(
        [
            "cmake",
            *("-S", str(harness.ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DSIDA_BUILD_{option}" for option in options),
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        ["cmake", "--build", str(BUILD), "--target", "cache_lookup"],
        check=True,
        capture_output=True,
    )


def measure(repetitions: int) -> dict[str, Any]:
    """Return seconds of a lookup."""
    program = BUILD / "benchmarks" / "cache_lookup"
    output = subprocess.run(
        [str(program), str(repetitions)], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(output)
    seconds = {name: harness.summary(found.pop(name)) for name in ("alone", "while_inserting")}
    return {
        **found,
        "seconds": seconds,
        "targets": [
            harness.target(
                "cache lookup while experts are inserted, µs",
                1e6 * seconds["while_inserting"]["median"],
                at_most=1.0,
            )
        ],
    }


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    build()
    harness.run("cache_lookup", options, lambda: measure(options.repetitions))


if __name__ == "__main__":
    main()
