# SPDX-License-Identifier: Apache-2.0
"""What ``sida`` takes, and the commands that it hands over to."""

from __future__ import annotations

from typing import Annotated

import typer

import sida
from sida.cli.demo import demo
from sida.cli.inspect import inspect
from sida.cli.predictor import evaluate, train_predictor

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


app.command()(inspect)
app.command()(demo)
app.command("train-predictor")(train_predictor)
app.command()(evaluate)
