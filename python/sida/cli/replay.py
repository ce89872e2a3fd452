# SPDX-License-Identifier: Apache-2.0
"""``sida replay``: what a run would do under other budgets, policies and links."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich import box
from rich.table import Table

import sida
from sida.cli.output import Json, milliseconds, percent, print_json, progress, report, user_errors
from sida.stats import hit_rate, size

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
T = TypeVar("T")

BANDWIDTH = re.compile(r"\s*([0-9.]+)\s*([kmg]i?|)b\s*/\s*s\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Recording:
    """Routing that `Offloaded.record` wrote, and its notes on the run.

    Attributes:
        routing: Which experts each token of each batch used.
        experts: In each layer.
        expert_bytes: Of one expert in fast memory.
        layer_seconds: Between the experts of one MoE layer and those of the next.
        expert_seconds: Computation of one expert in one layer call.
    """

    routing: sida.HashTable
    experts: int
    expert_bytes: int
    layer_seconds: float
    expert_seconds: float


@user_errors
def replay(
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE", help="Routing that a handle's record() wrote.", show_default=False
        ),
    ],
    memory: Annotated[
        str,
        typer.Option(help='Budgets, with commas between: "10%,0.5,2GiB,12 experts".'),
    ] = "10%,20%,50%",
    policy: Annotated[
        str,
        typer.Option(help="Eviction policies: fifo, lru, lfu, lookahead, auto."),
    ] = "auto",
    ahead: Annotated[
        str, typer.Option(help="How many hash tables are built ahead; 0: a run without tables.")
    ] = "0,16",
    bandwidth: Annotated[
        str | None,
        typer.Option(
            help='Rates of the slow tier, as "500MB/s,2GB/s"; without one no stall is foretold.',
            show_default=False,
        ),
    ] = None,
    latency: Annotated[float, typer.Option(help="Of each read of the slow tier, in seconds.")] = 0,
    foretold: Annotated[
        Path | None,
        typer.Option(
            help="Hash tables that a predictor built for the same batches; by default TRACE "
            "itself, which a perfect predictor would have built.",
            show_default=False,
        ),
    ] = None,
    expert_bytes: Annotated[
        int | None, typer.Option(help="By default as noted in TRACE.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the rows into this file.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Foretell what a run would do under other budgets, policies, and slow tiers.

    The recorded routing goes through the scheduler's own decisions in imagined time: no model, no
    bytes. Computation is taken to last as long as in the recorded run. **least** is what Belady's
    rule would move, which knows the whole trace; **stall** is of a batch.
    """
    if plot is not None:
        from sida.cli.plot import check_picture, plot_replays  # matplotlib

        check_picture(plot)  # before the replays, which may take a while
    recording = load_recording(trace, expert_bytes=expert_bytes)
    tables = None if foretold is None else sida.HashTable.load(foretold)
    rows = replay_all(
        recording,
        tables,
        memory=_list(memory, str),
        policy=_list(policy, str),
        ahead=_list(ahead, _tables_ahead),
        bandwidth=[None] if bandwidth is None else _list(bandwidth, _rate),
        latency=latency,
    )
    if plot is not None:
        plot_replays(rows, plot)
    if as_json:
        print_json({"trace": str(trace), "batches": len(recording.routing), "rows": rows})
    else:
        _show(recording, rows)


def load_recording(path: Path, *, expert_bytes: int | None = None) -> Recording:
    """Read recorded routing and its notes.

    Args:
        path: What `Offloaded.record` wrote.
        expert_bytes: Instead of what is noted.

    Raises:
        ValueError: A note is missing or is no number.
        OSError: The file is missing or damaged.
    """
    routing = sida.HashTable.load(path)
    with path.open("rb") as stream:  # of a file that load() has checked
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    notes: dict[str, str] = header["__metadata__"]
    try:
        return Recording(
            routing,
            experts=int(notes.get("experts", 1 + int(routing.ids.max(initial=0)))),
            expert_bytes=int(notes["expert_bytes"]) if expert_bytes is None else expert_bytes,
            layer_seconds=float(notes.get("layer_seconds", 0)),
            expert_seconds=float(notes.get("expert_seconds", 0)),
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is not noted: give --expert-bytes") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected numbers in its notes, got {error}") from None


def replay_all(
    recording: Recording,
    foretold: sida.HashTable | None,
    *,
    memory: Sequence[str],
    policy: Sequence[str],
    ahead: Sequence[int],
    bandwidth: Sequence[float | None],
    latency: float = 0,
) -> list[dict[str, Any]]:
    """Replay every combination.

    Returns:
        For each, what `sida.replay` returns and what was combined. `stall_seconds` is None without
        a bandwidth.
    """
    experts, expert_bytes = recording.experts, recording.expert_bytes
    if len(recording.routing) > 1:
        for budget, name in itertools.product(memory, policy):  # what cannot be is said at once
            sida.replay(
                recording.routing.slice(0),
                experts=experts,
                expert_bytes=expert_bytes,
                memory=budget,
                policy=name,
            )
    combinations = list(itertools.product(memory, policy, ahead, bandwidth))
    rows = []
    with progress() as bar:
        for budget, name, tables, rate in bar.track(combinations, description="replaying"):
            found = sida.replay(
                recording.routing,
                foretold,
                experts=experts,
                expert_bytes=expert_bytes,
                memory=budget,
                policy=name,
                ahead=tables,
                bytes_per_second=rate,
                latency_seconds=latency,
                layer_seconds=recording.layer_seconds,
                expert_seconds=recording.expert_seconds,
            )
            if rate is None:
                found["stall_seconds"] = found["seconds"] = None
            found.pop("layers")
            rows.append(
                {
                    "memory": budget,
                    "policy": name,
                    "ahead": tables,
                    "bytes_per_second": rate,
                    "hit_rate": hit_rate(found),
                    "times_belady": found["bytes_moved"] / max(1, found["belady_bytes"]),
                    **found,
                }
            )
    return rows


def _list(text: str, read: Callable[[str], T]) -> list[T]:
    """Return what stands between commas, each once."""
    return list(dict.fromkeys(read(item.strip()) for item in text.split(",")))


def _tables_ahead(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--ahead: expected whole numbers from 0 on, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    match = BANDWIDTH.fullmatch(text)
    try:
        value = float(match[1]) * UNITS[match[2].lower()] if match else 0.0
    except ValueError:
        value = 0.0
    if value < 1:
        raise ValueError(f'--bandwidth: expected a rate like "500MB/s" or "2GB/s", got {text!r}')
    return value


def _show(recording: Recording, rows: Sequence[dict[str, Any]]) -> None:
    console = report()
    total = recording.routing.layers * recording.experts
    cells = [_cells(row) for row in rows]
    same = {  # in all rows: said once, so that the table fits a terminal of 80 columns
        name: text
        for name, text in cells[0].items()
        if name in ("policy", "ahead", "GB/s") and all(row[name] == text for row in cells)
    }
    console.print(
        f"{len(recording.routing)} batches, {recording.routing.tokens:,} tokens; {total:,} experts "
        f"of {size(recording.expert_bytes)}"
        + "".join(f"; {name} {text}" for name, text in same.items())
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1 if same else 0, 0, 0))
    columns = [name for name in cells[0] if name not in same]
    for name in columns:
        is_text = name in ("memory", "policy")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[name] for name in columns))
    console.print(table)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    uses, rate = max(1, row["uses"]), row["bytes_per_second"]
    cells = {
        "memory": row["memory"],
        "policy": row["policy"],
        "experts": str(row["slots"]),
        "ahead": str(row["ahead"]),
        **{name: percent(row[name] / uses, 0) for name in ("hits", "late", "misses")},
        "moved": size(row["bytes_moved"]),
        "× least": f"{row['times_belady']:.2f}",
    }
    if rate is not None:
        cells["GB/s"] = f"{rate / 1e9:g}"
        cells["stall"] = milliseconds(row["stall_seconds"] / max(1, row["passes"]))
    return cells
