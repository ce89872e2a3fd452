# SPDX-License-Identifier: Apache-2.0
"""Reports to stdout, progress and errors to stderr, exit codes."""

from __future__ import annotations

import errno
import functools
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

INPUT, FAILURE = 2, 1
"""Exit codes: what was asked for cannot be; it failed."""
OF_INPUT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES)
"""What is wrong with a file that was named; none where it is damaged."""

Json = Annotated[
    bool, typer.Option("--json", help="Print JSON to stdout instead of a report for people.")
]
Memory = Annotated[
    str,
    typer.Option(
        help='What experts may take, over all layers: "20%" or 0.2 of them, "2GiB", "12 experts".'
    ),
]

P = ParamSpec("P")


class Failure(Exception):
    """What was asked for was right and could not be done."""


def report() -> Console:
    """Return the console that reports go to."""
    return Console(highlight=False)


def progress() -> Progress:
    """Return a progress bar on stderr, gone when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def note(text: str) -> None:
    """Tell on stderr what is going on."""
    Console(stderr=True, highlight=False).print(text, style="dim")


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def fail(message: str, code: int = INPUT) -> NoReturn:
    """Print an error to stderr and exit."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/bold red] {escape(message)}"
    )
    raise typer.Exit(code)


def user_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Have a command end its expected errors in a message and an exit code, not a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ValueError as error:
            fail(str(error))
        except ImportError as error:
            fail(_missing(error), FAILURE)
        except OSError as error:
            fail(str(error), INPUT if error.errno in OF_INPUT else FAILURE)
        except (Failure, MemoryError) as error:
            fail(str(error) or "out of memory", FAILURE)

    return run


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as people read it; None is a dash."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds with three digits or so."""
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _missing(error: ImportError) -> str:
    package = (error.name or "").split(".")[0]
    return f"{error}; install it with: pip install {package}" if package else str(error)
