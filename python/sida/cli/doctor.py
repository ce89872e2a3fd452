# SPDX-License-Identifier: Apache-2.0
"""``sida doctor``: what of a GPU's way to work is there, and what to do about what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import sida
from sida.cli.output import Json, print_json, report, user_errors
from sida.stats import size

GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "compute_capability": "compute_cap",
    "memory_mib": "memory.total",
    "free_mib": "memory.free",
    "pcie_generation": "pcie.link.gen.current",
    "pcie_generation_max": "pcie.link.gen.max",
    "pcie_width": "pcie.link.width.current",
}
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
SMALL_LIMIT = 1 << 30
"""Bytes of locked memory below which experts cannot sensibly be pinned."""


@user_errors
def doctor(as_json: Json = False) -> None:
    """Show what was found of driver, GPUs, toolkit and sida's CUDA part, and what to do.

    Works without a GPU. The copy rate is measured with 64 MiB of pinned memory.
    """
    found = look()
    if as_json:
        print_json(found)
        return
    console = report()
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    for name, value in _rows(found):
        table.add_row(name, value)
    console.print(table)
    for advice in found["advice"]:
        console.print(f"• {advice}", markup=False)


def look() -> dict[str, Any]:
    """Return what was found, by name; ``advice`` is a list of sentences."""
    found: dict[str, Any] = {
        "sida": sida.__version__,
        "cpu_isa": cpu_isa(),
        "gpus": gpus(),
        "toolkit": toolkit(),
        "libcublas": libcublas(),
        "pinned_memory_limit": pinned_memory_limit(),
        "extension": extension(),
    }
    found["advice"] = advice_on(found)
    return found


def cpu_isa() -> list[str]:
    """Return the instruction sets with kernels of sida's that this processor has."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return []
    there = flags.group(1).split() if flags else []
    return [flag for flag in ISA_FLAGS if flag in there]


def gpus() -> list[dict[str, str]]:
    """Return what nvidia-smi tells of each GPU; none where there is no driver."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}", *_PLAIN)
    lines = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    return [
        dict(zip(GPU_FIELDS, line, strict=True)) for line in lines if len(line) == len(GPU_FIELDS)
    ]


def toolkit() -> str | None:
    """Return the version of the CUDA toolkit's nvcc, or None."""
    release = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
    return release.group(1) if release else None


def libcublas() -> str | None:
    """Return where libcublas is: in the toolkit, or in a package of PyPI's; or None."""
    folders = []
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parents[1] / "lib64")
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folders += sorted(Path(place).glob("*/lib"))
    for folder in folders:
        for library in sorted(folder.glob("libcublas.so*")):
            return str(library)
    listed = re.search(r"libcublas\.so\S* .*=> (\S+)", _output("ldconfig", "-p"))
    return listed.group(1) if listed else None


def pinned_memory_limit() -> int | None:
    """Return how many bytes a process may lock (``ulimit -l``); None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def extension() -> dict[str, Any]:
    """Return what there is of sida's CUDA part: devices it sees, architectures, copy rates."""
    try:
        cuda = importlib.import_module("sida._cuda")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "sida._cuda"
        return {"built": not missing, "error": None if missing else str(error)}
    devices = cuda.devices()
    kernels = _output("cuobjdump", "--list-elf", str(cuda.__file__))
    return {
        "built": True,
        "error": None,
        "architectures": sorted(set(re.findall(r"\.(sm_\w+)\.", kernels))) or None,
        "devices": devices,
        "copy_bytes_per_second": [cuda.copy_rate(device) for device in range(devices)],
    }


def advice_on(found: dict[str, Any]) -> list[str]:
    """Return what to do about what is missing, the first thing first."""
    part = found["extension"]
    limit = found["pinned_memory_limit"]
    advice = []
    if not found["gpus"]:
        advice.append('No NVIDIA GPU or driver was found: use device="cpu", or install a driver.')
    if part["error"]:
        advice.append(f"sida's CUDA part cannot be loaded: {part['error']}")
    if not part["built"]:
        where = "" if found["toolkit"] else ", once the CUDA toolkit (nvcc) is on PATH"
        advice.append(f"sida was built without CUDA: install it again with pip install .{where}.")
    if part["built"] and not part["error"] and found["gpus"] and not part["devices"]:
        advice.append(
            "The driver shows no GPU to CUDA: check CUDA_VISIBLE_DEVICES, or update the driver."
        )
    if not found["libcublas"]:
        advice.append("libcublas was not found: pip install nvidia-cublas, or use the toolkit's.")
    if found["gpus"] and limit is not None and limit < SMALL_LIMIT:
        advice.append(
            f"Only {size(limit)} may be pinned: raise `ulimit -l`, or give host_memory= less."
        )
    for number, gpu in enumerate(found["gpus"]):
        if gpu["pcie_generation"] != gpu["pcie_generation_max"]:
            advice.append(
                f"GPU {number}'s link is at generation {gpu['pcie_generation']} of "
                f"{gpu['pcie_generation_max']}: normal at rest; if copies are slow, check the slot."
            )
    return advice or ["Nothing is missing."]


_PLAIN = ("--format=csv,noheader,nounits",)


def _output(program: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, *arguments], check=True, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    part, limit = found["extension"], found["pinned_memory_limit"]
    rows = [("sida", found["sida"]), ("CPU", " ".join(found["cpu_isa"]) or "portable path")]
    for number, gpu in enumerate(found["gpus"]):
        rows += [
            (
                f"GPU {number}",
                f"{gpu['name']}, sm_{gpu['compute_capability'].replace('.', '')}, "
                f"{gpu['free_mib']} of {gpu['memory_mib']} MiB free",
            ),
            ("  driver", gpu["driver"]),
            ("  PCIe", f"generation {gpu['pcie_generation']}, {gpu['pcie_width']} lanes"),
        ]
    if not found["gpus"]:
        rows.append(("GPU", "none"))
    rows += [
        ("CUDA toolkit", found["toolkit"] or "none"),
        ("libcublas", found["libcublas"] or "none"),
        ("may be pinned", "no limit" if limit is None else size(limit)),
        ("sida._cuda", _extension_row(part)),
    ]
    for number, rate in enumerate(part.get("copy_bytes_per_second", [])):
        rows.append((f"copies to GPU {number}", f"{rate / 1e9:.1f} GB/s from pinned memory"))
    return rows


def _extension_row(part: dict[str, Any]) -> str:
    if not part["built"]:
        return "not built"
    if part["error"]:
        return "cannot be loaded"
    named = " ".join(part["architectures"] or [])
    return f"for {named}" if named else "built (cuobjdump, which tells for what, was not found)"
