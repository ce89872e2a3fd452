# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: what happened when, and hit rates by layer."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sida.cli.ways import Run

COLORS = {
    "pass": "#b8c4d6",
    "compute": "#2a6f4e",
    "stall": "#e08a1e",
    "hash building": "#7b5ea7",
    "prefetch": "#3b7dd8",
    "demand load": "#c8102e",
}
LABELS = {
    "pass": "batch",
    "compute": "experts computed",
    "stall": "stall",
    "hash building": "hash table built",
    "prefetch": "expert loaded ahead",
    "demand load": "expert loaded on demand",
}
ROWS = {"pass": "batches", "compute": "MoE layers", "stall": "MoE layers"}
ROWS["hash building"] = "hash building"
PARTS = {"hits": "#2a6f4e", "late": "#e9b44c", "misses": "#c8102e"}


def check_picture(path: Path) -> None:
    """Check that a picture could be written there.

    Raises:
        ValueError: Of an unknown format.
        FileNotFoundError: Its folder is missing.
    """
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"{path}: expected a picture, one of {', '.join(sorted(formats))}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder of the picture is missing", str(path))


def plot_runs(runs: Sequence[Run], path: Path) -> None:
    """Draw the last run's timeline and all runs' hit rates by layer into a file."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[1, 1])
    last = runs[-1]
    plot_timeline(upper, last.trace)
    upper.set_title(
        f"A few batches, {last.way.routing} routing, {last.way.memory} of the experts in memory"
    )
    plot_hit_rates(lower, {run.way.name: run.stats["layers"] for run in runs})
    figure.savefig(path, dpi=120)


def plot_replays(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the bytes that replays move by the slots that they have, and their stalls if foretold.

    Args:
        rows: What `sida replay --json` prints.
        path: The picture to write.
    """
    stalls = any(row["stall_seconds"] is not None for row in rows)
    figure = Figure(figsize=(11 if stalls else 7, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if stalls else 1, squeeze=False)[0]
    least = {row["slots"]: row["belady_bytes"] / (1 << 20) for row in rows}
    for ahead, policy in sorted({(row["ahead"], row["policy"]) for row in rows}):
        mine = [row for row in rows if (row["ahead"], row["policy"]) == (ahead, policy)]
        name = f"{policy}, {ahead} tables ahead" if ahead else f"{policy}, no tables"
        moved = {row["slots"]: row["bytes_moved"] / (1 << 20) for row in mine}
        panels[0].plot(*zip(*sorted(moved.items()), strict=True), marker="o", label=name)
        for rate in sorted({row["bytes_per_second"] for row in mine} - {None}) if stalls else ():
            waits = {
                row["slots"]: 1000 * row["stall_seconds"] / max(1, row["passes"])
                for row in mine
                if row["bytes_per_second"] == rate
            }
            points = zip(*sorted(waits.items()), strict=True)
            panels[1].plot(*points, marker="o", label=f"{name}, {rate / 1e9:g} GB/s")
    panels[0].plot(
        *zip(*sorted(least.items()), strict=True), "k--", label="least possible (Belady)"
    )
    panels[0].set_ylabel("moved (MiB)")
    panels[-1].set_ylabel("stall a batch (ms)" if stalls else "moved (MiB)")
    for panel in panels:
        panel.set_xlabel("experts that fit")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize="small")
        _tidy(panel)
    figure.savefig(path, dpi=120)


def plot_timeline(axes: Axes, trace: Sequence[Mapping[str, Any]], *, batches: int = 3) -> None:
    """Draw what happened during some batches: loads, computing, stalls, one row a thread.

    Args:
        axes: Where to draw.
        trace: Events as `Offloaded.trace` writes them.
        batches: How many in a row are shown: those that took as long as is usual.
    """
    begin, end = _usual_stretch(trace, batches)
    visible = [e for e in trace if e["ts"] < end and e["ts"] + e["dur"] > begin]
    transfers = sorted({e["tid"] for e in trace if e["cat"] in ("prefetch", "demand load")})
    rows = ["batches", "MoE layers", *(f"transfers {i + 1}" for i in range(len(transfers)))]
    rows.append("hash building")
    for kind in COLORS:
        for event in (e for e in visible if e["cat"] == kind):
            row = ROWS.get(kind) or f"transfers {transfers.index(event['tid']) + 1}"
            start = max(event["ts"], begin)
            length = min(event["ts"] + event["dur"], end) - start
            axes.broken_barh(
                [((start - begin) / 1000, length / 1000)],
                (rows.index(row) - 0.4, 0.8),
                facecolors=COLORS[kind],
                linewidth=0,
            )
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlim(0, (end - begin) / 1000)
    axes.set_xlabel("time (ms)")
    kinds = [kind for kind in COLORS if any(e["cat"] == kind for e in visible)]
    axes.legend(
        handles=[Patch(color=COLORS[kind], label=LABELS[kind]) for kind in kinds],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=len(kinds),
        frameon=False,
        fontsize="small",
    )
    _tidy(axes)


def plot_hit_rates(axes: Axes, ways: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw which share of each layer's uses were hits, late and misses.

    Args:
        axes: Where to draw.
        ways: For each name, `Offloaded.stats()["layers"]`.
    """
    width = 0.8 / max(1, len(ways))
    for place, (name, layers) in enumerate(ways.items()):
        left = [i + (place - (len(ways) - 1) / 2) * width for i in range(len(layers))]
        bottom = [0.0] * len(layers)
        for part, color in PARTS.items():
            shares = [100 * layer[part] / max(1, layer["uses"]) for layer in layers]
            axes.bar(left, shares, width * 0.9, bottom=bottom, color=color)
            bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
        for x, layer in zip(left, layers, strict=True):
            axes.annotate(
                f"{name}\n{100 * layer['hits'] / max(1, layer['uses']):.0f} % hits",
                (x, 101),
                ha="center",
                va="bottom",
                fontsize="small",
            )
    names = [layer["name"] for layer in next(iter(ways.values()))]
    axes.set_xticks(range(len(names)), names, fontsize="small")
    axes.set_xlabel("MoE layer")
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("experts used (%)")
    axes.set_title("What a layer found when it asked for an expert")
    labels = {
        "hits": "hit: was in memory",
        "late": "late: was on its way",
        "misses": "miss: nobody had asked for it",
    }
    axes.legend(
        handles=[Patch(color=color, label=labels[part]) for part, color in PARTS.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
        frameon=False,
        fontsize="small",
    )
    _tidy(axes)


def _usual_stretch(trace: Sequence[Mapping[str, Any]], batches: int) -> tuple[float, float]:
    """Begin and end of the batches in a row that take the median time, in microseconds."""
    passes = sorted((e["ts"], e["ts"] + e["dur"]) for e in trace if e["cat"] == "pass")
    if not passes:
        return 0.0, max((e["ts"] + e["dur"] for e in trace), default=1.0)
    count = min(batches, len(passes))
    stretches = [(passes[i][0], passes[i + count - 1][1]) for i in range(len(passes) - count + 1)]
    return sorted(stretches, key=lambda stretch: stretch[1] - stretch[0])[len(stretches) // 2]


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
