# SPDX-License-Identifier: Apache-2.0
"""Running each way in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from sida.cli.output import Failure

PRELOADED = ["sida.cli.ways", "sida.cli.random_model"]

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work in steps: yields after each, and returns its result."""


def prepare() -> None:
    """Begin, in the background, the imports of the process that the others are forked from."""
    forkserver.set_forkserver_preload(PRELOADED)
    with _environment(OMP_WAIT_POLICY="PASSIVE"), _interrupts_later(inherited=True):
        forkserver.ensure_running()


class Apart(Generic[T]):
    """Work that goes on in a process of its own, step by step, each when it is asked for.

    The process is forked from one that has imported torch and transformers and done nothing else,
    so that all but the first start at once. Leaving the context ends it.
    """

    def __init__(self, work: Callable[..., Steps[T]], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_run, args=(there, work, arguments), daemon=True)
        prepare()
        with _interrupts_later():  # half a start is a process that complains
            self._process.start()
        there.close()

    def step(self) -> tuple[T] | None:
        """Have the next step done; return the result, in a tuple, after the last.

        Raises:
            Failure: The process ended without a word, as when the system kills it.
            Exception: What the work raised.
        """
        try:
            self._connection.send(None)
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=10)
            code = self._process.exitcode
            raise Failure(
                f"the process that ran the model ended with exit code {code}"
                + (" (killed: out of memory?)" if code == -9 else "")
            ) from None
        if kind == "error":
            raise value
        return (value,) if kind == "result" else None

    def run(self) -> T:
        """Have all steps done."""
        while (result := self.step()) is None:
            pass
        return result[0]

    def __enter__(self) -> Apart[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._process.kill()  # it has said all that it has to say
        self._process.join()


@contextmanager
def _environment(**defaults: str) -> Iterator[None]:
    """Set variables that are not set, for what is started meanwhile.

    OpenMP's threads, which torch computes with, spin where they wait, unless told otherwise. They
    then hold the cores that loading, hash building and other programs want: on a busy machine of 2
    cores that made batches take up to fifty times as long, whichever way the model ran.
    """
    missing = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextmanager
def _interrupts_later(*, inherited: bool = False) -> Iterator[None]:
    """Put off Ctrl-C to the end; with `inherited`, what is started meanwhile leaves it to us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    later = signal.SIG_IGN if inherited else lambda number, _: pending.append(number)
    handler = signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pending:
        raise KeyboardInterrupt


def _run(connection: Connection, work: Callable[..., Steps[Any]], arguments: Any) -> None:
    try:
        steps = work(*arguments)
        while True:
            connection.recv()
            try:
                next(steps)
            except StopIteration as end:
                connection.send(("result", end.value))
                return
            connection.send(("step", None))
    except (ValueError, OSError, MemoryError, ImportError) as error:
        connection.send(("error", error))
    except EOFError:
        pass  # nobody waits any longer
