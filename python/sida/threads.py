# SPDX-License-Identifier: Apache-2.0
"""How many threads compute where nobody says."""

from __future__ import annotations

import sys

from sida._core import usable_processors

USABLE = usable_processors()
"""Threads that this process can run at once, as it was when sida was imported."""


def default_threads() -> int:
    """Return as many threads as torch uses, where torch is loaded; no more than can run at once.

    Torch counts the machine's processors, and knows nothing of a container's CPU quota.
    """
    torch = sys.modules.get("torch")
    return USABLE if torch is None else min(USABLE, int(torch.get_num_threads()))
