# SPDX-License-Identifier: Apache-2.0
"""Calls of one handle from several threads take turns."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BETWEEN_LOOKS = 0.05
"""Seconds after which a thread that waits looks again whether a loan is over."""
COMPILED_CALLS = "torch._dynamo.eval_frame"
"""The module through which every call of something compiled goes."""
FORKED = (
    "this process was forked from the one that offloaded the model, and the handle's threads "
    'stayed there: offload in this process, or start it by multiprocessing\'s "spawn"'
)


@dataclass(frozen=True)
class _Loan:
    thread: int
    end: Callable[[], None]


class Turn:
    """A lock that the thread that has it may take again, and that can be lent to a compiled graph.

    A graph begins its pass in one operator and ends it in another, and of an error between them
    nobody is told. So a loan is over when the thread that took it is in no compiled call any more,
    which those who wait look after.
    """

    def __init__(self) -> None:
        self._free = threading.Condition(threading.RLock())
        self._loan: _Loan | None = None
        self._process = os.getpid()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Have the turn, once no other thread has it and no graph on another thread.

        Raises:
            RuntimeError: This process was forked from the one that made the handle.
        """
        if os.getpid() != self._process:  # where a thread may have had the turn that is not here
            raise RuntimeError(FORKED)
        # a generator, since one that is interrupted before the caller's block lets go of the lock
        with self._free:
            while self._is_lent_elsewhere():
                self._free.wait(BETWEEN_LOOKS)
            yield

    def lend(self, end: Callable[[], None]) -> None:
        """Lend the turn, which this thread has, to the compiled call that it is in.

        Args:
            end: Called when the loan is over.
        """
        self._loan = _Loan(threading.get_ident(), end)

    def give_back(self) -> None:
        """End this thread's loan; nothing if it has none."""
        with self._free:
            if self._loan is not None and self._loan.thread == threading.get_ident():
                self._end(self._loan)

    def _is_lent_elsewhere(self) -> bool:
        if self._loan is not None and not _is_in_compiled_call(self._loan.thread):
            self._end(self._loan)
        return self._loan is not None and self._loan.thread != threading.get_ident()

    def _end(self, loan: _Loan) -> None:
        self._loan = None
        self._free.notify_all()
        loan.end()


def _is_in_compiled_call(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__") == COMPILED_CALLS:
            return True
        frame = frame.f_back
    return False
