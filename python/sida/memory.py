# SPDX-License-Identifier: Apache-2.0
"""How much RAM is left."""

from __future__ import annotations

from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of RAM that this process could still take; None where the kernel is silent.

    That is what the kernel estimates for the machine, or less where a control group (a container)
    has a limit.

    Args:
        root: Where proc and sys are.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    group = _left_in_group(root)
    return machine if group is None else min(machine, group)


def _left_in_group(root: Path) -> int | None:
    """Return what the limit of this process's control group leaves; None without a limit."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
        name = next(line[3:] for line in groups if line.startswith("0::"))
        folder = root / "sys/fs/cgroup" / name.strip().lstrip("/")
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, StopIteration, ValueError):  # no limit is spelled "max"
        return None
    # pages of files that nobody uses go when memory is short
    used -= sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    return max(0, limit - used)
