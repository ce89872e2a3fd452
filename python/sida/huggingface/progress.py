# SPDX-License-Identifier: Apache-2.0
"""Progress bars for what may take long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
from transformers.utils import logging

DELAY = 1.0
"""Seconds before a bar is shown: what is done sooner needs none."""


class ProgressBar(tqdm):  # type: ignore[misc,unused-ignore]
    """A bar that starts no thread of its own."""

    monitor_interval = 0


def progress_bar(what: str, size: int | None) -> ProgressBar:
    """Return a bar for `size` bytes; transformers' switch for its own bars turns it off too.

    Args:
        what: What is being done, in a few words.
        size: Bytes in all; None where they are not known yet.
    """
    return ProgressBar(
        desc=what,
        total=size,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        miniters=1,
        delay=DELAY,
        disable=not logging.is_progress_bar_enabled(),
    )


@contextmanager
def reporting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that shows how far something is: (bytes done, bytes in all).

    Args:
        what: What is being done, in a few words.
    """
    with progress_bar(what, None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
