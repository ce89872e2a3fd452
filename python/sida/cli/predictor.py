# SPDX-License-Identifier: Apache-2.0
"""``sida train-predictor`` and ``sida evaluate``: a predictor for one's own model and texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table

from sida.cli.locate import read_texts
from sida.cli.output import Json, note, percent, print_json, report, user_errors
from sida.stats import size

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sida.cli.classifier import Batch

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a Mixture-of-Experts model of transformers, with its tokenizer.",
        show_default=False,
    ),
]
Texts = Annotated[
    Path,
    typer.Argument(
        metavar="TEXTS",
        help='Texts, one a line; in a .jsonl file the "text" of each line.',
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts at a time.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Use only the first texts.", show_default=False)
]
Device = Annotated[str, typer.Option(help="Where torch runs the model: cpu, cuda.")]


@user_errors
def train_predictor(
    model: Model,
    texts: Texts,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="File to write, a .safetensors.", show_default=False),
    ],
    kind: Annotated[
        Literal["lstm", "transformer", "token"],
        typer.Option(
            help="lstm: the paper's; transformer: small, and nearer to the routers' choice; "
            "token: looks at each token alone."
        ),
    ] = "lstm",
    steps: Annotated[int, typer.Option(min=1, help="Batches to train on.")] = 2500,
    batch_size: BatchSize = 64,
    seed: Annotated[int, typer.Option(help="Of the initial weights and of the order.")] = 0,
    limit: Limit = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a predictor of a model's routing on texts of your own. No labels are needed.

    The model's routers are recorded while it reads the texts, and the predictor learns to say
    the same from the token embeddings alone. Pass the file that is written as predictor= to
    sida.offload, or as --predictor to **sida evaluate**.
    """
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise FileNotFoundError(f"expected a file in a folder that exists, got {out}")
    check_model(model)
    lines = read_texts(texts)[:limit]
    loaded, batches, _ = _load(model, lines, batch_size, device)
    import sida

    started = time.perf_counter()
    predictor = sida.train_predictor(loaded, batches, kind, steps=steps, seed=seed)
    seconds = time.perf_counter() - started
    predictor.save(out)
    result: dict[str, Any] = {
        "model": str(model),
        "texts": len(lines),
        "predictor": str(out),
        "kind": kind,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "layers": predictor.layers,
        "heads": predictor.heads,
        "parameters": sum(p.numel() for p in predictor.network.parameters()),
        "bytes": out.stat().st_size,
        "seconds": seconds,
    }
    if as_json:
        print_json(result)
        return
    report().print(
        f"Wrote {out}: {kind}, {size(result['bytes'])}, for {len(predictor.heads)} of "
        f"{predictor.layers} MoE layers; {steps} steps of {batch_size} texts took {seconds:.0f} s. "
        f"How good it is on other texts: sida evaluate {model} TEXTS --predictor {out}"
    )


@user_errors
def evaluate(
    model: Model,
    texts: Texts,
    predictor: Annotated[
        Path | None,
        typer.Option(
            help="The predictor's file; by default predictor.safetensors in the model's folder.",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure how well a predictor foretells a model's routing, on texts it was not trained on.

    For each MoE layer: how often the expert that the router chose is the first (top-1), or among
    the first three (top-3), that the predictor names, over tokens without padding; and which
    share of the experts that a batch needs the table names (coverage). Fidelity is the share of
    the model's predictions that stay the same when the predictor routes it.
    """
    chosen = predictor or model / "predictor.safetensors"
    check_model(model)
    if not chosen.is_file():
        raise FileNotFoundError(f"expected a predictor's file at {chosen}; pass --predictor FILE")
    lines = read_texts(texts)[:limit]
    import sida

    note("loading torch, transformers and the model ...")
    found = sida.load_predictor(chosen)
    loaded, batches, logits = _load(model, lines, batch_size, device)
    note(f"three runs of {len(batches)} batches ...")
    result = {
        "model": str(model),
        "predictor": str(chosen),
        "kind": found.kind,
        "texts": len(lines),
        "batch_size": batch_size,
        **found.evaluate(loaded, batches, logits),
    }
    if as_json:
        print_json(result)
    else:
        _show(result)


def check_model(path: Path) -> None:
    """Raise unless there is a folder of a model."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"expected a model's folder with a config.json, found none at {path}"
        )


def _load(
    path: Path, texts: list[str], batch_size: int, device: str
) -> tuple[Any, list[Batch], Callable[[Any, Any], Tensor] | None]:
    """A model, texts as its batches, and what gives its predictions where it does not itself."""
    import torch
    import transformers

    from sida.cli.classifier import Classifier, be_quiet, load_encoder, tokenize

    be_quiet()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    batches = tokenize(tokenizer, texts, batch_size)
    model = load_encoder(path).to(device)
    if (path / "head.safetensors").is_file():
        classifier = Classifier(path)
        return model, batches, classifier
    if not getattr(model.config, "is_encoder_decoder", False):
        return model, batches, None
    start = getattr(model.config, "decoder_start_token_id", None) or 0

    def first_token(model: Any, batch: Batch) -> Tensor:
        ids = torch.full((len(batch["input_ids"]), 1), start, device=device)
        inputs = {name: value.to(device) for name, value in batch.items()}
        logits: Tensor = model(**inputs, decoder_input_ids=ids).logits
        return logits

    return model, batches, first_token


def _show(result: dict[str, Any]) -> None:
    console = report()
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("MoE layer")
    columns = {
        "top1": "top-1",
        "top3": "top-3",
        "coverage1": "coverage\nby top-1",
        "coverage3": "coverage\nby top-3",
    }
    for column in columns.values():
        table.add_column(column, justify="right", no_wrap=True)
    for index, layer in enumerate(result["layers"]):
        table.add_row(layer, *(percent(result[key][index]) for key in columns))
    console.print(table)
    console.print(
        f"Over {result['tokens']:,} tokens of {result['texts']:,} texts, {result['batch_size']} at "
        f"a time. Routed by the predictor, the model keeps {percent(result['fidelity'], 2)} of its "
        "predictions."
    )
