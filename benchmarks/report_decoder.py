# SPDX-License-Identifier: Apache-2.0
"""The blocks and the plot of docs/decoder-routing.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from report_tables import needs, table

Results = Mapping[str, Any]

WAYS = {
    "fifo": "cache alone, fifo",
    "lru": "cache alone, lru",
    "lfu": "cache alone, lfu",
    "auto": "cache alone, auto",
    "belady": "cache alone, Belady's rule",
    "look-ahead": "look-ahead",
    "predictor": "trained predictor and look-ahead",
    "recorded": "recorded tables, one token ahead",
}
POLICIES = ("fifo", "lru", "lfu", "auto")
NAMED_BY = {
    "token before": "the experts of the token before",
    "look-ahead": "look-ahead",
    "predictor": "the trained predictor",
}


@needs("decoder_routing")
def decoder_origin(results: Results) -> str:
    """What was run, on what."""
    found = results["decoder_routing"]
    rows = [
        ("model", f"`models/{found['model']}`, {found['experts']} experts"),
        ("reading", f"{found['excerpts']} held-out excerpts, {found['tokens']} tokens of each"),
        (
            "writing",
            f"their first {found['prompt']} tokens, then what the model draws at temperature "
            f"{found['temperature']:g}",
        ),
        ("command", f"`{found['command']}`"),
        *((key, found[key]) for key in ("commit", "torch", "transformers", "python")),
        ("processor", f"{found['cpu']['model']}, {found['cores']} cores"),
    ]
    return table(("", ""), rows)


@needs("decoder_routing")
def decoder_gains(results: Results) -> str:
    """What each way gains at a quarter of the experts."""
    lines = []
    for name, task in results["decoder_routing"]["tasks"].items():
        rates = task["rates"]["25"]
        best = max(POLICIES, key=lambda policy: rates[policy]["hits"])
        others = ", ".join(
            f"{what} {_percent(_in_time(rates[way]))}"
            for way, what in (
                ("look-ahead", "look-ahead"),
                ("predictor", "both look-ahead and the trained predictor"),
                ("belady", "Belady's rule without foretelling"),
            )
        )
        lines.append(
            f"- **{name.capitalize()}** with a quarter of the experts: the best cache alone has "
            f"{_percent(rates[best]['hits'])} ({best}) of what is asked for, {others}. Look-ahead "
            f"brings {_times(rates, 'look-ahead')} times as many experts as auto alone, both "
            f"{_times(rates, 'predictor')} times."
        )
    exact, predicted = (
        results["decoder_routing"]["perplexity"][routing] for routing in ("exact", "predicted")
    )
    lines.append(
        f'- **Predicted routing**: with `routing="predicted"` the routers do not run, and these '
        f"excerpts have a perplexity of {predicted:.1f}; with the model's own routing, whatever "
        f"brings the experts, it is {exact:.1f}."
    )
    worst = max(
        (
            rates["auto"]["loads"] / rates[policy]["loads"],
            policy,
            f"{task}, {share} %",
        )
        for task, found in results["decoder_routing"]["tasks"].items()
        for share, rates in found["rates"].items()
        for policy in POLICIES
        if policy != "auto"
    )
    lines.append(
        f"- **A loss**: alone, `auto` brings up to {worst[0]:.2f} times what {worst[1]} does "
        f"({worst[2]})."
        if worst[0] > 1
        else f"- **Alone**, `auto` brings the fewest, at most {worst[0]:.2f} times what the best "
        f"of the others does ({worst[1]}; {worst[2]})."
    )
    return "\n".join(lines)


@needs("decoder_routing")
def decoder_rates(results: Results) -> str:
    """Hit rates by task, way and budget."""
    return "\n\n".join(
        _rates(name, task["rates"]) for name, task in results["decoder_routing"]["tasks"].items()
    )


@needs("decoder_routing")
def decoder_layers(results: Results) -> str:
    """Which part of a token's experts is named beforehand."""
    rows = [
        (f"{task}: {NAMED_BY[name]}", *(_percent(part) for part in parts))
        for task, found in results["decoder_routing"]["tasks"].items()
        for name, parts in found["layers"].items()
    ]
    return table(("layer", *map(str, range(len(rows[0]) - 1))), rows)


BLOCKS = {
    function.__name__.replace("_", "-"): function
    for function in (decoder_origin, decoder_gains, decoder_rates, decoder_layers)
}


def draw_rates(panels: Any, found: Mapping[str, Any]) -> None:
    """Draw hits and late uses by budget, a panel for each task."""
    for axes, (name, task) in zip(panels, found["tasks"].items(), strict=True):
        budgets = [int(share) for share in task["rates"]]
        for way in next(iter(task["rates"].values())):
            values = [100 * _in_time(rates[way]) for rates in task["rates"].values()]
            alone = way in POLICIES
            style = "k--" if way == "belady" else ":" if alone else "-"
            axes.plot(budgets, values, style, marker="o", markersize=3, label=WAYS[way])
        axes.set_title(name, fontsize="small")
        axes.set_xlabel("experts in memory, %")
        axes.set_ylim(0, 102)
    panels[0].set_ylabel("in memory or under way, %")
    panels[0].legend(frameon=False, fontsize="x-small", loc="lower right")


def _rates(name: str, rates: Mapping[str, Mapping[str, Any]]) -> str:
    head = (f"**{name}**, experts in memory", *(f"{share} %" for share in rates))
    ways = list(next(iter(rates.values())))
    rows = [(WAYS[way], *(_cell(found[way]) for found in rates.values())) for way in ways]
    return table(head, rows)


def _cell(counts: Mapping[str, float]) -> str:
    late = counts["late"]
    more = f" + {_percent(late)} late" if late >= 0.005 else ""
    return f"{_percent(counts['hits'])}{more} ({counts['loads']:.1f})"


def _times(rates: Mapping[str, Any], way: str) -> str:
    return f"{rates[way]['loads'] / rates['auto']['loads']:.2f}"


def _in_time(counts: Mapping[str, float]) -> float:
    return counts["hits"] + counts["late"]


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.0f} %"
