# SPDX-License-Identifier: Apache-2.0
"""``sida doctor``, with and without what it looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sida.cli import doctor
from sida.cli.app import app

WHOLE: dict[str, Any] = {
    "gpus": [{"pcie_generation": "5", "pcie_generation_max": "5"}],
    "toolkit": "13.0",
    "libcublas": "/usr/lib/libcublas.so.13",
    "pinned_memory_limit": None,
    "extension": {"built": True, "error": None, "devices": 1},
}


def _program(folder: Path, name: str, output: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)


def test_without_anything_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["gpus"], found["toolkit"]) == ([], None)
    assert 'use device="cpu"' in found["advice"][0]
    for_people = CliRunner().invoke(app, ["doctor"])
    assert for_people.exit_code == 0
    assert 'use device="cpu"' in for_people.stdout


def test_programs_are_asked_for_what_they_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "NVIDIA H200, 580.95.05, 9.0, 143771, 143000, 4, 5, 16"
    _program(tmp_path, "nvidia-smi", f"{line}\n{line}")
    _program(tmp_path, "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = doctor.look()
    assert [gpu["driver"] for gpu in found["gpus"]] == ["580.95.05"] * 2
    assert found["gpus"][0]["pcie_width"] == "16"
    assert found["toolkit"] == "13.0"
    assert sum("generation 4 of 5" in advice for advice in found["advice"]) == 2
    report = CliRunner().invoke(app, ["doctor"]).stdout
    assert "sm_90" in report
    assert "generation 4, 16 lanes" in report


def test_a_program_that_fails_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpus() == []


def test_advice_is_about_what_is_missing() -> None:
    assert doctor.advice_on(WHOLE) == ["Nothing is missing."]
    for change, words in (
        ({"extension": {"built": False, "error": None}}, "built without CUDA"),
        ({"extension": {"built": True, "error": "libcudart"}}, "cannot be loaded: libcudart"),
        ({"extension": {"built": True, "error": None, "devices": 0}}, "CUDA_VISIBLE_DEVICES"),
        ({"libcublas": None}, "nvidia-cublas"),
        ({"pinned_memory_limit": 8 << 20}, "ulimit -l"),
    ):
        (advice,) = doctor.advice_on({**WHOLE, **change})
        assert words in advice
