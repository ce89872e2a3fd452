# SPDX-License-Identifier: Apache-2.0
"""What ``sida`` takes, and the commands that it hands over to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import sida
from sida.cli.convert import convert
from sida.cli.demo import demo
from sida.cli.doctor import doctor
from sida.cli.inspect import inspect
from sida.cli.predictor import evaluate, train_predictor
from sida.cli.replay import replay
from sida.cli.tune import tune

app = typer.Typer(
    name="sida",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sida {sida.__version__}")
        raise typer.Exit


@app.callback()
def sida_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run Mixture-of-Experts models whose experts do not fit in fast memory.

    Begin with **sida demo**, which shows what that means on real text, and with
    **sida inspect PATH** for a checkpoint of your own.
    """


EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    inspect: (
        "sida inspect models/wordnet-switch-32",
        "sida inspect models/wordnet-switch-32 --memory 20% --dtype f32",
    ),
    convert: (
        "sida convert switch-base-128 switch-base-128-safetensors",
        "sida convert IN OUT --max-shard-size 500MB",
    ),
    demo: ("sida demo", "sida demo --memory 10% --plot demo.png"),
    doctor: ("sida doctor", "sida doctor --json"),
    tune: (
        "sida tune MODEL",
        "sida tune --hidden-size 2048 --intermediate-size 768 --experts 128 --top-k 8 --gated",
    ),
    train_predictor: (
        "sida train-predictor MODEL texts.txt predictor.safetensors",
        "sida train-predictor MODEL texts.jsonl out.safetensors --kind transformer",
    ),
    evaluate: (
        "sida evaluate MODEL held_out.txt",
        "sida evaluate MODEL held_out.txt --predictor out.safetensors",
    ),
    replay: (
        "sida replay TRACE --memory 10%,20%,50% --policy auto,lru --ahead 0,1,16",
        "sida replay TRACE --bandwidth 500MB/s,2GB/s --plot replay.png",
    ),
}

for command, examples in EXAMPLES.items():
    epilog = "For example:\n\n" + "\n\n".join(f"`{example}`" for example in examples)
    app.command(command.__name__.replace("_", "-"), epilog=epilog)(command)
