# SPDX-License-Identifier: Apache-2.0
"""How tables and figures look on the pages that are made from results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Block = Callable[[Mapping[str, Any]], str]
"""Makes what a page shows of all results."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Return three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def milliseconds(times: Mapping[str, float]) -> str:
    """Return median and minimum."""
    return f"{1e3 * times['median']:.2f} ({1e3 * times['minimum']:.2f})"


def limit(kept: Mapping[str, Any]) -> str:
    """Return what a figure was to keep to."""
    if "at_most" in kept:
        return f"≤ {number(kept['at_most'])}"
    return f"≥ {number(kept['at_least'])}"


def targets_table(targets: Iterable[Mapping[str, Any]]) -> str:
    """Return every target, what was measured, and whether it is kept."""
    rows = [
        (kept["what"], number(kept["figure"]), limit(kept), "yes" if kept["met"] else "**no**")
        for kept in targets
    ]
    return table(("what", "measured", "target", "kept"), rows) if rows else nothing()


def nothing(name: str = "") -> str:
    """Return what stands where results are missing: those of a benchmark, or of all."""
    part = name.removeprefix("cuda_")
    command = "scripts/benchmark" if part == name else f"scripts/gpu {part}"
    return f"Not recorded yet: `{command}`."


def needs(name: str) -> Callable[[Block], Block]:
    """Let a block say that results are missing where those of a benchmark are."""

    def decorate(block: Block) -> Block:
        @functools.wraps(block)
        def shown(results: Mapping[str, Any]) -> str:
            return block(results) if name in results else nothing(name)

        return shown

    return decorate
