# SPDX-License-Identifier: Apache-2.0
"""What recipes have in common: packages to read, a split, schedules, checkpoints, files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn


def unpack_debian(package: str, downloads: Path) -> Path:
    """The root of a Debian package's files, fetched and unpacked without installing it.

    Raises:
        RuntimeError: It could not be fetched.
    """
    unpacked = downloads / package
    if not unpacked.is_dir():
        downloads.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", package], cwd=downloads, check=True)
            archive = next(downloads.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", str(archive), str(unpacked)], check=True)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise RuntimeError(
                f"could not fetch Debian's {package} with apt-get download: is this Debian, and "
                "has apt-get update been run?"
            ) from error
    return unpacked


def is_held_out(text: str, per_mille: int = 65) -> bool:
    """Whether a text belongs to the held-out part: so many of every 1000 distinct ones do.

    The text alone decides, so the split is the same everywhere and a text that occurs twice never
    lies on both sides.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < per_mille


def learning_rate(step: int, steps: int) -> float:
    """The share of the peak rate at a step: a warm-up, then a cosine."""
    warm_up = min(100, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def save_atomically(path: Path, value: dict[str, Any]) -> None:
    """Writes a checkpoint; whoever reads finds the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, settings: Mapping[str, Any], device: torch.device
) -> dict[str, Any] | None:
    """The checkpoint of an unfinished run, None where there is none.

    Raises:
        SystemExit: It is of a run with other settings.
    """
    if not path.is_file():
        return None
    saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if saved["settings"] != settings:
        raise SystemExit(
            f"{path} is of a run with other settings ({saved['settings']}): "
            "use them, or another --out, or remove it"
        )
    return saved


def round_weights(module: nn.Module) -> None:
    """Rounds a module's parameters to bfloat16 values, kept as float32."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).to(torch.float32))


def save_in_half(model: nn.Module, folder: Path) -> None:
    """Writes a transformers model's config.json and, in bfloat16, its weights.

    The config's dtype stays float32: that is what the model is evaluated in, and what
    ``from_pretrained`` then gives. Call `round_weights` before evaluating, so that the figures are
    those of the files.
    """
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    model.to(torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def provenance(device: torch.device) -> dict[str, Any]:
    """The command that runs, on what, and with which versions."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
