# SPDX-License-Identifier: Apache-2.0
"""``sida demo --scale``: the memory that a large model really takes under a budget."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sida.cli.output import Failure, note, print_json, progress, report
from sida.stats import size

BATCHES = 3
SIZES = (8, 16, 32, 64, 128, 256)


def demonstrate_scale(
    scale: str, memory: str, folder: Path | None, seed: int, as_json: bool
) -> None:
    """Write a checkpoint of a published size with random weights, run it, and say what it took.

    Args:
        scale: "switch-base-64" and its like.
        memory: What experts may take.
        folder: Where the checkpoint goes for as long as it takes.
        seed: Of weights and tokens.
        as_json: Print JSON.
    """
    experts = experts_of(scale)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"expected a folder for the checkpoint, found none at {folder}")
    result = run_scale(scale, experts, memory, folder, seed)
    if as_json:
        print_json(result)
    else:
        _show(result)


def experts_of(scale: str) -> int:
    """Return how many experts a layer of a published model has."""
    match = re.fullmatch(r"switch-base-(\d+)", scale)
    if match is None or int(match[1]) not in SIZES:
        raise ValueError(
            f"expected --scale to be one of {', '.join(f'switch-base-{n}' for n in SIZES)}; "
            f"got {scale}"
        )
    return int(match[1])


def run_scale(
    scale: str, experts: int, memory: str, folder: Path | None, seed: int
) -> dict[str, Any]:
    """Write, run and remove the checkpoint; return all figures, memory in bytes."""
    note("importing torch and transformers ...")
    from sida.cli.processes import Apart, prepare

    prepare()
    from sida.cli.random_model import (
        check_memory,
        layout_bytes,
        model_layout,
        run_random_model,
        shard_count,
        switch_base,
        write_random_model,
    )

    config = switch_base(experts)
    check_memory(config, memory)
    layout = model_layout(config)
    needed = layout_bytes(layout)
    with tempfile.TemporaryDirectory(prefix="sida-scale-", dir=folder) as name:
        checkpoint = Path(name)
        _check_room(checkpoint, needed)
        with progress() as bar:
            task = bar.add_task(f"writing {size(needed)}", total=shard_count(layout))
            for _ in write_random_model(checkpoint, config, layout, seed):
                bar.advance(task)
            task = bar.add_task("loading, then batches", total=1 + BATCHES)
            with Apart(run_random_model, checkpoint, memory, BATCHES, seed) as work:
                while (done := work.step()) is None:
                    bar.advance(task)
            run = done[0]
    stats = run.stats
    all_experts = stats["total_experts"] * stats["slot_bytes"]
    result = {
        "scale": scale,
        "memory": memory,
        "seed": seed,
        "moe_layers": len(stats["layers"]),
        "experts_per_layer": experts,
        "experts_total": stats["total_experts"],
        "experts_resident": stats["slots"],
        "model_bytes": needed,
        "all_experts_bytes": all_experts,
        "other_bytes": needed - all_experts,
        "expert_bytes": stats["budget_bytes"] + stats["staging_bytes"],
        "process_before_bytes": run.before_bytes,
        "process_loaded_bytes": run.loaded_bytes,
        "process_peak_bytes": run.peak_bytes,
        "load_seconds": run.load_seconds,
        "batches": BATCHES,
        "batch_tokens": run.tokens,
        "batch_seconds": run.batch_seconds,
        "hit_rate": stats["hit_rate"],
        "bytes_moved": stats["bytes_moved"],
    }
    return {**result, "summary": in_a_sentence(result)}


def in_a_sentence(result: dict[str, Any]) -> str:
    """Return what the figures say."""
    peak, before = result["process_peak_bytes"], result["process_before_bytes"]
    return (
        f"A model of {size(result['model_bytes'])} ran {result['batches']} batches in a process "
        f"that never had more than {size(peak)} resident, {size(before)} of it Python and torch; "
        f"with all its weights in memory it would have taken "
        f"{size(result['model_bytes'] + before)} or more."
    )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise Failure(
            f"the checkpoint takes {size(needed)}, but {folder.parent} has {size(free)} free: "
            "choose another folder with --dir, or a smaller --scale"
        )
    from sida.huggingface.expert_file import file_system

    if (kind := file_system(folder)) in ("tmpfs", "ramfs"):
        note(
            f"{folder.parent} is a {kind}, that is RAM: the checkpoint takes memory too, though "
            "not this process's; choose a folder on a disk with --dir"
        )


def _show(result: dict[str, Any]) -> None:
    console = report()
    console.print(
        f"{result['scale']} with random weights in bf16: {result['moe_layers']} MoE layers of "
        f"{result['experts_per_layer']} experts"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("memory", justify="right")
    for name, key in (
        ("all weights of the model", "model_bytes"),
        ("  its experts", "all_experts_bytes"),
        ("  everything else, always in memory", "other_bytes"),
    ):
        table.add_row(name, size(result[key]))
    table.add_section()
    held = f"{result['experts_resident']} of {result['experts_total']}"
    for name, key in (
        (f"experts may take ({result['memory']}: {held})", "expert_bytes"),
        ("process with Python and torch, before loading", "process_before_bytes"),
        ("process after loading", "process_loaded_bytes"),
        ("process at its peak", "process_peak_bytes"),
    ):
        table.add_row(name, size(result[key]))
    console.print(table)
    console.print(result["summary"])
    seconds = ", ".join(f"{s:.1f}" for s in result["batch_seconds"])
    console.print(
        f"Loading took {result['load_seconds']:.1f} s, batches of {result['batch_tokens']} tokens "
        f"{seconds} s; {size(result['bytes_moved'])} of experts were read. The system's file "
        "cache, which it gives up when memory is short, is not counted.",
        style="dim",
    )
