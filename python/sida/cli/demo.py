# SPDX-License-Identifier: Apache-2.0
"""``sida demo``: real sentences, classified with all experts in memory and with a fifth of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from sida.cli.locate import draw_sentences, find_model
from sida.cli.output import (
    Json,
    Memory,
    milliseconds,
    note,
    percent,
    print_json,
    progress,
    report,
    user_errors,
)
from sida.stats import size


@user_errors
def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a classifier, laid out as models/wordnet-switch-32; by default that.",
            show_default=False,
        ),
    ] = None,
    memory: Memory = "20%",
    sentences: Annotated[
        int, typer.Option(min=1, help="How many held-out sentences to classify.")
    ] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Which sentences are drawn.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw a timeline and hit rates by layer into this file (PNG, PDF, SVG).",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="Instead, write a checkpoint of this size with random weights and show the "
            "memory that running it takes: switch-base-8, -16, -32, -64 (7 GiB on disk) or -128.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Where --scale writes; by default the system's temporary folder. Removed after.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Classify real sentences three ways: all experts in memory, and a fifth of them, twice.

    A Switch Transformer trained on WordNet names the kind of thing that a definition defines. It
    runs with all experts in memory; with 20 % of them, routed by the model itself (exact); and
    with 20 % of them, routed by the hash predictor (predicted), as in SiDA-MoE. Works offline.
    """
    if scale is not None:
        if plot is not None:
            raise ValueError("--plot goes with the demonstration itself, not with --scale")
        from sida.cli.scale import demonstrate_scale

        demonstrate_scale(scale, memory, folder, seed, as_json)
        return
    if plot is not None:
        check_plot(plot)
    chosen = find_model(model)
    check_memory(chosen, memory)
    result = run_demo(chosen, memory, sentences, batch_size, seed, plot)
    if as_json:
        print_json(result)
    else:
        show(result)


def run_demo(
    model: Path, memory: str, count: int, batch_size: int, seed: int, plot: Path | None
) -> dict[str, Any]:
    """Run the three ways, each in a process of its own, and return all figures."""
    note("importing torch and transformers ...")
    from sida.cli.processes import Apart, prepare

    prepare()
    from sida.cli.ways import Run, rounds, run_way, summary, three_ways

    sentences = draw_sentences(model, count, seed)
    runs: list[Run] = []
    with progress() as bar, ExitStack() as stack:
        works = [
            stack.enter_context(Apart(run_way, model, way, sentences, batch_size))
            for way in three_ways(memory)
        ]
        total = len(works) * (1 + rounds(len(sentences), batch_size))
        steps = bar.add_task("three ways, in turns", total=total)
        while len(runs) < len(works):
            for work in works:
                if (result := work.step()) is not None:
                    runs.append(result[0])
                bar.advance(steps)
    if plot is not None:
        from sida.cli.plot import plot_runs

        plot_runs(runs[1:], plot)
    ways = [summary(run, sentences, runs[0]) for run in runs]
    return {
        "model": str(model),
        "memory": memory,
        "sentences": len(sentences),
        "batch_size": batch_size,
        "tokens": runs[0].tokens,
        "seed": seed,
        "ways": ways,
        "plot": None if plot is None else str(plot),
        "summary": in_a_sentence(ways, len(sentences)),
    }


def check_plot(path: Path) -> None:
    """Raise unless a plot can be written there."""
    import matplotlib  # noqa: F401

    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"expected a folder for {path}, found none")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"expected --plot FILE ending in .png, .pdf or .svg, got {path}")


def check_memory(model: Path, memory: str) -> None:
    """Raise unless the budget can be right, before anything is loaded."""
    import sida

    sida.ExpertStore.open(model).slots(memory)


def in_a_sentence(ways: list[dict[str, Any]], sentences: int) -> str:
    """Return what the figures say."""
    resident, exact, predicted = ways
    same = round(exact["fidelity"] * sentences)
    if exact["identical"]:
        answers = f"gave all {sentences} sentences the same class, with logits equal to the bit,"
    elif same == sentences:
        answers = f"gave all {sentences} sentences the same class"
    else:
        answers = f"gave {same} of {sentences} sentences the same class"
    changed = sentences - round(predicted["fidelity"] * sentences)
    return (
        f"With room for {exact['experts_resident']} of {exact['experts_total']} experts "
        f"({size(exact['expert_bytes'])} instead of {size(resident['expert_bytes'])}), the model's "
        f"own routing {answers} and took {_median(exact)} a batch where all resident took "
        f"{_median(resident)} (medians); the predictor's routing changed {changed} of {sentences} "
        f"answers, moved accuracy from {percent(resident['accuracy'])} to "
        f"{percent(predicted['accuracy'])}, and took {_median(predicted)}."
    )


def show(result: dict[str, Any]) -> None:
    """Print the table and the sentence."""
    console = report()
    ways = result["ways"]
    console.print(
        f"{result['sentences']} held-out sentences ({result['tokens']:,} tokens), "
        f"{result['batch_size']} at a time, {result['model']}"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for way in ways:
        limit = "" if way["routing"] == "exact" and way is ways[0] else f"\n{result['memory']}"
        table.add_column(f"{way['way']}{limit}", justify="right", min_width=12)
    for name, cell in _ROWS:
        table.add_row(name, *(cell(way) for way in ways))
    console.print(table)
    console.print(result["summary"])
    console.print(
        "Fidelity: share of sentences with the same class as with all experts resident. Memory of "
        "the process counts Python and torch. What was read of the checkpoint may come from the "
        "system's file cache.",
        style="dim",
    )
    if result["plot"]:
        console.print(f"Timeline and hit rates: {result['plot']}")


def _median(way: dict[str, Any]) -> str:
    return milliseconds(way["latency_p50_seconds"])


_ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("accuracy", lambda way: percent(way["accuracy"])),
    ("fidelity", lambda way: percent(way["fidelity"])),
    ("logits equal to the bit", lambda way: "yes" if way["identical"] else "no"),
    ("sentences a second", lambda way: f"{way['sentences_per_second']:,.0f}"),
    ("tokens a second", lambda way: f"{way['tokens_per_second']:,.0f}"),
    ("latency of a batch, p50", lambda way: milliseconds(way["latency_p50_seconds"])),
    ("latency of a batch, p95", lambda way: milliseconds(way["latency_p95_seconds"])),
    ("hit rate", lambda way: percent(way["hit_rate"])),
    ("hits + late + misses", lambda way: f"{way['hits']} + {way['late']} + {way['misses']}"),
    ("stall, in all", lambda way: milliseconds(way["stall_seconds"])),
    ("memory of experts", lambda way: size(way["expert_bytes"])),
    ("peak memory of process", lambda way: size(way["process_peak_bytes"])),
]
