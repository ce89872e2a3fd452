# SPDX-License-Identifier: Apache-2.0
"""``sida inspect``: what a checkpoint holds, and what budgets mean for it. Loads no weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

import sida
from sida.cli.output import Json, percent, print_json, report, user_errors
from sida.packing import NAMES, packing_of, ratio_lost, what_is_lost
from sida.stats import size

SHARES = (0.1, 0.2, 0.5, 1.0)
GIB = 1 << 30
LAYOUTS = {
    "switch_transformers": "one expert a module, wi and wo (Switch Transformers)",
    "per_expert": "one expert a module, gate_proj, up_proj and down_proj",
    "mixtral": "one expert a module, w1, w2 and w3 (Mixtral)",
    "stacked": "all experts of a layer stacked in one tensor",
    "interleaved": "gate and up taking turns",
    **NAMES,
}
"""Words of a store's layout, and what they mean."""
FP8 = "F8_E4M3"
FP8_SCALES = ".weight_scale_inv"
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BYTES = {"f32": 4, "f16": 2, "bf16": 2}


@user_errors
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A .safetensors file, or a folder with model.safetensors or its shards.",
            show_default=False,
        ),
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            help='Show this budget only: "20%" or 0.2 of all experts, "2GiB", "12 experts".',
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What the experts would be kept and computed in: f32, f16 or bf16; by default as "
            "stored, bf16 where they are packed.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds, how large its experts are, and what budgets mean for it.

    Reads headers only. A budget is what the experts of all layers together may take in fast
    memory; it is never exceeded. Any budget of one expert or more works.
    """
    found = inspect_checkpoint(path, memory=memory, dtype=dtype)
    if as_json:
        print_json(found)
    else:
        _show(found)


def inspect_checkpoint(
    path: Path, *, memory: str | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Return what `sida inspect` shows.

    Args:
        path: A safetensors file, or a folder of a checkpoint.
        memory: One budget; by default a choice of them.
        dtype: Of the experts in fast memory.

    Raises:
        ValueError: There are no experts, or the budget cannot be right.
        OSError: The checkpoint is missing or damaged.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"expected a checkpoint, found nothing at {path}: give a .safetensors file or a folder"
        )
    store = sida.ExpertStore.open(path, dtype=dtype)
    config = store.config
    total = config.total_experts
    prefixes = tuple(f"{name}.experts." for name in store.layer_names)
    tensors = _tensors(path)
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    parameters = {
        name: tensor.elements for name, tensor in others.items() if not name.endswith(FP8_SCALES)
    }
    budgets = [memory] if memory is not None else _budgets(total, store.slab_bytes)
    return {
        "path": str(path),
        "layout": store.layout,
        "layers": list(store.layer_names),
        "experts_per_layer": config.experts,
        "experts": total,
        "top_k": config.top_k,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "activation": config.activation,
        "gated": config.gated,
        "dtype": config.dtype,
        "transformers_dtype": _transformers_dtype(path),
        "expert_bytes": store.slab_bytes,
        "all_experts_bytes": total * store.slab_bytes,
        "staging_bytes": store.staging_bytes,
        "stored_bytes": store.stored_bytes,
        "packing": packing_of(store),
        "ratio_lost": ratio_lost(store) if packing_of(store) else None,
        "what_is_lost": what_is_lost(store),
        "other_bytes": sum(others[name].bytes_loaded(config.dtype) for name in parameters),
        "expert_parameters": total * _parameters(config),
        "other_parameters": sum(parameters.values()),
        "budgets": [_budget(store, total, budget) for budget in budgets],
    }


def _budgets(total: int, expert_bytes: int) -> list[str]:
    """A choice of budgets: one expert, shares, and sizes that memory comes in."""
    shares = [f"{share:.0%}" for share in SHARES if share * total >= 1]
    everything = total * expert_bytes
    sizes = [amount for amount in (1, 2, 4, 8, 16, 24, 48, 80, 141) if amount * GIB < everything]
    if not sizes:
        sizes_mib = [a for a in (1, 4, 16, 64, 256, 512) if expert_bytes < a << 20 < everything]
        return ["1 expert", *shares, *(f"{amount}MiB" for amount in sizes_mib)]
    return ["1 expert", *shares, *(f"{amount}GiB" for amount in sizes)]


def _budget(store: sida.ExpertStore, total: int, memory: str) -> dict[str, Any]:
    slots = store.slots(memory)
    return {
        "memory": memory,
        "experts": slots,
        "bytes": slots * store.slab_bytes,
        "share": slots / total,
    }


def _transformers_dtype(path: Path) -> str | None:
    """What transformers loads the model in, if its config says so."""
    config = path / "config.json"
    if not config.is_file():
        return None
    values = json.loads(config.read_text(encoding="utf-8"))
    named = values.get("dtype") or values.get("torch_dtype")
    return DTYPES.get(named) if isinstance(named, str) else None


def _parameters(config: sida.MoeConfig) -> int:
    """Of an expert."""
    rows = config.intermediate_size * (2 if config.gated else 1)
    biases = rows * config.up_bias + config.hidden_size * config.down_bias
    return (rows + config.intermediate_size) * config.hidden_size + biases


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    elements: int
    stored_bytes: int

    def bytes_loaded(self, dtype: str) -> int:
        """Bytes in memory: what is in fp8 is dequantised."""
        return self.elements * BYTES[dtype] if self.dtype == FP8 else self.stored_bytes


def _tensors(path: Path) -> dict[str, _Tensor]:
    """Each tensor, from the headers that opening the store has checked."""
    files = [path]
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        if single.is_file():
            files = [single]
        else:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [path / shard for shard in sorted(set(shards))]
    tensors: dict[str, _Tensor] = {}
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            tensors[name] = _Tensor(tensor["dtype"], math.prod(tensor["shape"]), end - begin)
    return tensors


def _show(found: dict[str, Any]) -> None:
    console = report()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    layers = found["layers"]
    gate = "gated, " if found["gated"] else ""
    for name, value in (
        ("checkpoint", found["path"]),
        ("layout", ", ".join(LAYOUTS.get(word, word) for word in found["layout"].split(", "))),
        ("MoE layers", f"{len(layers)}: {_shortened(layers)}"),
        (
            "experts",
            f"{found['experts']:,} ({found['experts_per_layer']} a layer, top-{found['top_k']}), "
            f"hidden {found['hidden_size']}, intermediate {found['intermediate_size']}, "
            f"{gate}{found['activation']}",
        ),
        ("one expert", f"{size(found['expert_bytes'])} in {found['dtype']}"),
        (
            "all experts",
            f"{size(found['all_experts_bytes'])} ({_count(found['expert_parameters'])} parameters)",
        ),
        (
            "everything else",
            f"{size(found['other_bytes'])} ({_count(found['other_parameters'])} parameters), "
            "always in memory",
        ),
    ):
        facts.add_row(name, value)
    console.print(facts)
    console.print()
    console.print(_budget_table(found))
    for line in _remarks(found):
        console.print(line, style="dim")


def _budget_table(found: dict[str, Any]) -> Table:
    table = Table(
        title="What a budget holds", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("memory", no_wrap=True)
    for column in ("experts", "of all", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for budget in found["budgets"]:
        table.add_row(
            f'"{budget["memory"]}"',
            f"{budget['experts']:,}",
            percent(budget["share"]),
            size(budget["bytes"]),
        )
    return table


def _remarks(found: dict[str, Any]) -> list[str]:
    remarks = [found["what_is_lost"]] if found["what_is_lost"] else []
    if found["staging_bytes"]:
        remarks.append(
            f"Reading converts through a buffer of {size(found['staging_bytes'])}: it comes on top "
            "of counts and shares, and out of budgets in bytes."
        )
    loaded = found["transformers_dtype"]
    if loaded not in (None, found["dtype"]):
        remarks.append(
            f"transformers loads this model in {loaded}: sizes are then those of --dtype {loaded}."
        )
    return remarks


def _shortened(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"


def _count(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"
