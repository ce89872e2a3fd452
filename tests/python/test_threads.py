# SPDX-License-Identifier: Apache-2.0
"""How many threads compute where nobody says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sida import threads
from sida._core import usable_processors


@pytest.mark.parametrize("usable, of_torch, expected", [(2, 8, 2), (8, 2, 2), (3, 3, 3)])
def test_as_many_as_torch_uses_and_no_more_than_can_run(
    monkeypatch: pytest.MonkeyPatch, usable: int, of_torch: int, expected: int
) -> None:
    monkeypatch.setattr(threads, "USABLE", usable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    assert threads.default_threads() == expected
    monkeypatch.delitem(sys.modules, "torch")
    assert threads.default_threads() == usable


def test_no_more_than_the_affinity_allows() -> None:
    assert 1 <= usable_processors() <= len(os.sched_getaffinity(0))
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from sida._core import usable_processors; print(usable_processors())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"
