# SPDX-License-Identifier: Apache-2.0
"""``sida tune``: which expert kernel is fastest on this GPU, for the shapes that one uses."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

import sida
from sida._core import MoeConfig, check_cuda
from sida.cli.output import Failure, Json, print_json, progress, report, user_errors

TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
SIZES = ("hidden_size", "intermediate_size", "experts", "top_k")
SHAPE = ("dtype", "gated", *SIZES, "tokens")
"""What a choice of kernel is for."""


@user_errors
def tune(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A checkpoint, whose experts' shape is taken; instead of the options for it.",
            show_default=False,
        ),
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="H, of the hidden states.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="I, inside an expert.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of a layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts that a token goes to.")] = None,
    gated: Annotated[
        bool, typer.Option("--gated", help="An activated gate multiplies the up projection.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="f32, f16 or bf16; by default the model's, else bf16."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Of a call, each measured.")] = TOKENS,
    device: Annotated[str, typer.Option(help='"cuda", or "cuda:1" and the like.')] = "cuda",
    repetitions: Annotated[int, typer.Option(min=5, help="Turns of each kernel.")] = 30,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure and report; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the expert kernels on this GPU, and keep those that beat what sida would choose.

    Kernels run in turns, on random experts that are not in the GPU's cache. One replaces another
    in the table only where it wins by more than the spread of the difference. Layers go by the
    table from the next process on; calls are told apart by tokens, rounded up to a power of two.

    The table is `kernels-GPU.json` in `~/.config/sida` (or `$XDG_CONFIG_HOME/sida`), or the file
    that `SIDA_KERNEL_TABLE` names; set to nothing, sida goes by its own table alone.
    """
    sizes = dict(zip(SIZES, (hidden_size, intermediate_size, experts, top_k), strict=True))
    config = _config(model, sizes, gated, dtype)
    counts = _counts(tokens)
    cuda = _cuda(device)
    gpu = cuda.device_name(device)
    path = cuda.kernel_table_path(gpu)
    if path is None and not dry_run:
        raise ValueError(
            "there is no file for the table: SIDA_KERNEL_TABLE is set to nothing, or HOME is not "
            "set; name a file with SIDA_KERNEL_TABLE, or measure with --dry-run"
        )
    rows = []
    with progress() as bar:
        for count in bar.track(counts, description="measuring"):
            rows.append(compare(cuda, device, config, count, repetitions))
    replaced = [row for row in rows if row["replaced"]]
    if replaced and not dry_run:
        write_table(Path(path), gpu, replaced)
    found = {
        "gpu": gpu,
        "sida": sida.__version__,
        "table": path,
        "written": bool(replaced) and not dry_run,
        "rows": rows,
    }
    if as_json:
        print_json(found)
    else:
        _show(found)


def compare(
    cuda: Any, device: str, config: MoeConfig, tokens: int, repetitions: int
) -> dict[str, Any]:
    """Return what the kernels took for calls of so many tokens, and which is to be chosen.

    Args:
        cuda: The module `sida._cuda`.
        device: The GPU.
        config: Of the layer.
        tokens: Of a call.
        repetitions: Turns.
    """
    current = cuda.kernel_of(device, config, tokens)
    times = dict(cuda.time_kernels(device, config, tokens, repetitions))
    medians = {kernel: statistics.median(taken) for kernel, taken in times.items()}
    best = min(medians, key=lambda kernel: medians[kernel])
    gains = [was - now for was, now in zip(times[current], times[best], strict=True)]
    deciles = statistics.quantiles(gains, n=10)
    gain, spread = statistics.median(gains), deciles[-1] - deciles[0]
    shape = {name: getattr(config, name) for name in SHAPE if name != "tokens"}
    return {
        **shape,
        "tokens": tokens,
        "kernel": best if best != current and gain > spread else current,
        "replaced": best != current and gain > spread,
        "was": current,
        "fastest": best,
        "gain_us": round(gain, 2),
        "spread_us": round(spread, 2),
        "median_us": {kernel: round(median, 2) for kernel, median in medians.items()},
    }


def write_table(path: Path, gpu: str, rows: list[dict[str, Any]]) -> None:
    """Put choices into a table, in place of those for the same calls; other choices stay.

    The file is whole at every moment: it is written beside its place and moved there.

    Args:
        path: Of the table, which need not be there.
        gpu: What the driver calls the GPU.
        rows: As `compare` returns them.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))["choices"] if path.exists() else []
    choices = {_key(choice): choice for choice in kept}
    for row in rows:
        wanted = (*SHAPE, "kernel", "was", "gain_us", "spread_us", "median_us")
        choices[_key(row)] = {name: row[name] for name in wanted}
    table = {
        "format": "sida-kernels",
        "sida": sida.__version__,
        "gpu": gpu,
        "choices": list(choices.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False
    ) as file:
        beside = Path(file.name)
        try:
            file.write(json.dumps(table, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink()
            raise


def _key(choice: Mapping[str, Any]) -> tuple[Any, ...]:
    """Calls that a choice is for: their tokens come to the same power of two."""
    return (*(choice[name] for name in SHAPE[:-1]), (choice["tokens"] - 1).bit_length())


def _cuda(device: str) -> Any:
    """The module that measures; a failure where it cannot."""
    try:
        try:
            cuda = importlib.import_module("sida._cuda")
        except ImportError:
            check_cuda(device)  # says why there is none
            raise
        cuda.device_name(device)
    except sida.CudaError as error:
        raise Failure(str(error)) from error
    return cuda


def _config(
    model: Path | None, sizes: Mapping[str, int | None], gated: bool, dtype: str | None
) -> MoeConfig:
    given = [_option(name) for name, size in sizes.items() if size is not None]
    if model is not None:
        if given or gated:
            both = ", ".join([*given, *(["--gated"] if gated else [])])
            raise ValueError(f"expected a model or a shape, got both: {model} and {both}")
        if not model.exists():
            raise FileNotFoundError(
                f"expected a checkpoint, found nothing at {model}: give a .safetensors file or a "
                "folder"
            )
        return sida.ExpertStore.open(model, dtype=dtype).config
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(known) < len(sizes):
        missing = ", ".join(_option(name) for name in SIZES if name not in known)
        raise ValueError(f"expected a model, or a layer's shape; missing: {missing}")
    return MoeConfig(
        layers=1,
        experts=known["experts"],
        hidden_size=known["hidden_size"],
        intermediate_size=known["intermediate_size"],
        top_k=known["top_k"],
        activation="silu" if gated else "relu",
        gated=gated,
        dtype=dtype or "bf16",
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--tokens: expected whole numbers above 0, with commas, got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))


def _show(found: Mapping[str, Any]) -> None:
    console = report()
    rows = found["rows"]
    shape = rows[0]
    console.print(
        f"{found['gpu']}: {shape['dtype']}, {shape['experts']} experts of "
        f"{shape['hidden_size']} x {shape['intermediate_size']}"
        f"{', gated' if shape['gated'] else ''}, top {shape['top_k']}; medians in µs",
        markup=False,
    )
    kernels = list(dict.fromkeys(kernel for row in rows for kernel in row["median_us"]))
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for name in ("tokens", *kernels):
        table.add_column(name, justify="right")
    table.add_column("chosen", no_wrap=True)
    table.add_column("wins by (spread)", justify="right")
    for row in rows:
        times = [row["median_us"].get(kernel) for kernel in kernels]
        wins = row["fastest"] != row["was"]
        table.add_row(
            str(row["tokens"]),
            *("–" if time is None else f"{time:.1f}" for time in times),
            f"{row['kernel']}, was {row['was']}" if row["replaced"] else row["kernel"],
            f"{row['gain_us']:.1f} ({row['spread_us']:.1f})" if wins else "",
        )
    console.print(table)
    count = sum(row["replaced"] for row in rows)
    if not count:
        console.print("No kernel beats what is chosen by more than the spread: nothing changes.")
    elif found["written"]:
        console.print(f"Changed: {count}, written to {found['table']}", markup=False)
    else:
        console.print(f"To change: {count}; nothing is written (--dry-run).")
