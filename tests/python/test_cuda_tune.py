# SPDX-License-Identifier: Apache-2.0
"""Measuring kernels on a GPU, and the table of them that layers go by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpu import needs_gpu
from typer.testing import CliRunner

from sida.cli.app import app

pytestmark = needs_gpu

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 256, 192, 8, 2, 64
SHAPE = [
    *("--hidden-size", str(HIDDEN), "--intermediate-size", str(INTERMEDIATE)),
    *("--experts", str(EXPERTS), "--top-k", str(TOP_K)),
]
LAYER = f"""
import importlib, sys, torch, sida
from sida._core import MoeConfig
cuda = importlib.import_module("sida._cuda")
torch.manual_seed(0)
make = dict(device="cuda", dtype=torch.bfloat16)
up = torch.randn({EXPERTS}, {INTERMEDIATE}, {HIDDEN}, **make) * {HIDDEN}**-0.5
down = torch.randn({EXPERTS}, {HIDDEN}, {INTERMEDIATE}, **make) * {INTERMEDIATE}**-0.5
hidden = torch.randn({TOKENS}, {HIDDEN}, **make)
ids = torch.rand({TOKENS}, {EXPERTS}, device="cuda").topk({TOP_K}, -1).indices
weights = torch.rand({TOKENS}, {TOP_K}, device="cuda")
outs = []
for memory in ("1 expert", 1.0):
    with sida.OffloadedExperts(up, down, gated=False, activation="relu", memory=memory) as layer:
        outs += [layer(hidden, ids, weights) for _ in range(2)]
assert all(torch.equal(out, outs[0]) for out in outs)
config = MoeConfig(layers=1, experts={EXPERTS}, hidden_size={HIDDEN},
                   intermediate_size={INTERMEDIATE}, top_k={TOP_K}, dtype="bf16")
print(cuda.kernel_of("cuda", config, {TOKENS}), outs[0].float().sum().item(),
      outs[0].float().norm().item())
"""


def layer(table: Path | str) -> subprocess.CompletedProcess[str]:
    """Run a layer in a process of its own, with this table."""
    environment = {**os.environ, "SIDA_KERNEL_TABLE": str(table)}
    return subprocess.run(
        [sys.executable, "-c", LAYER], env=environment, capture_output=True, text=True
    )


def table_of(kernel: str, gpu: str | None = None) -> dict[str, Any]:
    choice = dict(dtype="bf16", gated=False, top_k=TOP_K, experts=EXPERTS, hidden_size=HIDDEN)
    choice |= dict(intermediate_size=INTERMEDIATE, tokens=TOKENS, kernel=kernel)
    gpu = gpu or torch.cuda.get_device_name()
    return {"format": "sida-kernels", "gpu": gpu, "choices": [choice]}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_kernels_for_the_shape_are_measured(dtype: str) -> None:
    arguments = [*SHAPE, "--tokens", "1,100", "--dtype", dtype, "--dry-run", "--json"]
    result = CliRunner().invoke(app, ["tune", *arguments, "--repetitions", "10"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["gpu"] == torch.cuda.get_device_name()
    for row in found["rows"]:
        assert {row["was"], row["kernel"]} <= row["median_us"].keys()
        assert all(0.5 < time < 1e6 for time in row["median_us"].values())
        assert row["kernel"] in ("dot", "tiled", "general") or dtype == "bf16"
        assert row["fastest"] == min(row["median_us"], key=row["median_us"].__getitem__)


def test_layers_go_by_the_table_at_every_budget(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    seen = {}
    for kernel in ("general", "grouped"):
        path.write_text(json.dumps(table_of(kernel)))
        done = layer(path)
        assert done.returncode == 0, done.stderr
        name, total, norm = done.stdout.split()
        assert name == kernel
        seen[kernel] = (total, float(norm))
    assert seen["general"][0] != seen["grouped"][0], "both tables gave the same bits"
    assert seen["general"][1] == pytest.approx(seen["grouped"][1], rel=5e-3)
    without = layer("")
    assert without.returncode == 0 and without.stdout.split()[0] != "general"


@pytest.mark.parametrize("content", ["{", '{"format": "sida-kernels", "gpu": "x"}', None])
def test_a_damaged_table_is_named_and_nothing_runs(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "kernels.json"
    if content is not None:
        path.write_text(content)
    done = layer(path)
    assert done.returncode != 0
    assert "OSError" in done.stderr and str(path) in done.stderr


def test_a_table_of_another_gpu_or_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    for table, words in (
        (table_of("general", gpu="Other GPU"), "got one of a Other GPU"),
        (table_of("warp9"), "'warp9'"),
    ):
        path.write_text(json.dumps(table))
        done = layer(path)
        assert done.returncode != 0
        assert str(path) in done.stderr and words in done.stderr
