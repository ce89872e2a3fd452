# SPDX-License-Identifier: Apache-2.0
"""What a handle counted, as a dict that prints well."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sida._core import ExpertCache, OffloadScheduler

COLUMNS = ("calls", "uses", "hits", "late", "misses", "hit rate", "stall")


class Stats(dict[str, Any]):
    """Counts since the handle was made, or since `reset_stats()`; a dict, and JSON.

    A *use* is one expert in one layer call. `hits`: it was resident when the layer asked; `late`:
    it had been asked for earlier and was under way; `misses`: nobody had asked before. hits + late
    + misses = uses; what only padding needs counts in none of them. `hit_rate` is hits / uses, None
    without uses. `wasted`: prefetched experts evicted, or still resident, unread. `stall_seconds`:
    computation stood still because an expert was not there, on a GPU by its clock. `budget_bytes` =
    `slots` * `slot_bytes` is what experts may take, `staging_bytes` come on top. `exact_layers` and
    `predicted_layers` name the layers by how they are routed. `layers` has the counts of each
    layer, `passes` and `tokens` (without padding) what went through encoder and decoder.

    `look_ahead`, of all layers and of each, says how well the next layer's router on this layer's
    input foretold what the next layer needs: of the `uses` in the layer calls for which that was
    done, `foretold_uses` were among the `foretold` experts; `hit_rate` is foretold_uses / uses,
    `precision` foretold_uses / foretold. Over all layers, of the `loads` that it began, `used` were
    read by a layer, which had to wait the less for them, and `wasted` never (`bytes_used` and
    `bytes_wasted` are their bytes), and `cancelled` were given up half-way, once the layer turned
    out not to need them. `off` says why it is not done, where something stands against it.
    """

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        head, *body = self._rows()
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        table = f"<tr>{cells}</tr>" + "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in body
        )
        notes = "<br>".join(html.escape(note) for note in self._notes())
        return f"<table>{table}</table><p>{notes}</p>"

    def _rows(self) -> list[list[str]]:
        rows = [["layer", "routing", *COLUMNS]]
        for layer in self["layers"]:
            rows.append([layer["name"], layer["routing"], *_cells(layer)])
        return [*rows, ["all", "", *_cells(self)]]

    def _notes(self) -> list[str]:
        place = "used in place" if self["in_place"] else f"{self['policy']} eviction"
        staging = f" + {size(self['staging_bytes'])} staging" if self["staging_bytes"] else ""
        notes = [
            f"{self['passes']} passes, {self['tokens']} tokens; moved "
            f"{size(self['bytes_moved'])} ({self['loads']} experts, {self['prefetches']} ahead of "
            f"use, {self['wasted']} wasted)",
            f"room for {self['slots']} of {self['total_experts']} experts: "
            f"{size(self['budget_bytes'])}{staging}; {self['resident_experts']} resident, {place}",
        ]
        ahead = self["look_ahead"]
        if ahead["uses"]:
            notes.insert(
                1,
                f"look-ahead foretold {_percent(ahead['hit_rate'])} of the uses (precision "
                f"{_percent(ahead['precision'])}); of {ahead['loads']} experts that it brought "
                f"{ahead['used']} were used, {ahead['wasted']} wasted",
            )
        return notes


def collect(
    scheduler: OffloadScheduler,
    cache: ExpertCache,
    names: list[str],
    *,
    predicted: frozenset[int],
    total_experts: int,
    staging_bytes: int,
    passes: int,
    tokens: int,
) -> Stats:
    """Return the counts of a scheduler and the sizes of its cache.

    Args:
        scheduler: What counts.
        cache: Its cache.
        names: Of the layers.
        predicted: Layers that are routed by hash table.
        total_experts: Over all layers.
        staging_bytes: That reading takes beside the cache.
        passes: Counted by the caller.
        tokens: Counted by the caller.
    """
    stats = Stats(scheduler.stats())
    for index, (name, layer) in enumerate(zip(names, stats["layers"], strict=True)):
        layer["name"] = name
        layer["routing"] = "predicted" if index in predicted else "exact"
        layer["hit_rate"] = hit_rate(layer)
        _add_rates(layer["look_ahead"])
    _add_rates(stats["look_ahead"])
    for name in ("used", "wasted"):
        stats["look_ahead"][f"bytes_{name}"] = stats["look_ahead"][name] * cache.slot_bytes
    resident = len(cache.resident())
    stats.update(
        hit_rate=hit_rate(stats),
        passes=passes,
        tokens=tokens,
        policy=cache.policy,
        device=cache.device,
        in_place=cache.in_place,
        slots=cache.slots,
        total_experts=total_experts,
        slot_bytes=cache.slot_bytes,
        budget_bytes=cache.slots * cache.slot_bytes,
        staging_bytes=staging_bytes,
        resident_experts=resident,
        resident_bytes=resident * cache.slot_bytes,
        exact_layers=[name for i, name in enumerate(names) if i not in predicted],
        predicted_layers=[name for i, name in enumerate(names) if i in predicted],
    )
    return stats


def hit_rate(counts: dict[str, Any]) -> float | None:
    """Return hits / uses, None where there were none."""
    return _share(counts["hits"], counts["uses"])


def _add_rates(look_ahead: dict[str, Any]) -> None:
    right = look_ahead["foretold_uses"]
    look_ahead["hit_rate"] = _share(right, look_ahead["uses"])
    look_ahead["precision"] = _share(right, look_ahead["foretold"])


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def size(count: int) -> str:
    """Return a number of bytes as people read it."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def _cells(counts: dict[str, Any]) -> list[str]:
    rate = counts["hit_rate"]
    return [
        *(str(counts[name]) for name in ("calls", "uses", "hits", "late", "misses")),
        _percent(rate),
        f"{1000 * counts['stall_seconds']:.1f} ms",
    ]
