# SPDX-License-Identifier: Apache-2.0
"""``sida tune``: what replaces what, and the file; on a GPU that is made up, and without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sida._core import MoeConfig
from sida.cli.app import app

GPU = "NVIDIA Test 8GB"
SHAPE = ["--hidden-size", "64", "--intermediate-size", "32", "--experts", "4", "--top-k", "2"]
TURNS = 20


class Gpu:
    """Stands for ``sida._cuda``: the kernels' times are said, with noise common to a turn."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.noise = [float(turn % 5) for turn in range(TURNS)]
        self.times = {"narrow": 20.0, "hopper": 10.0}
        self.own_noise = 0.1
        self.seen: list[tuple[MoeConfig, int]] = []

    def module(self) -> Any:
        return SimpleNamespace(
            device_name=lambda device: GPU,
            kernel_table_path=lambda gpu: None if self.path is None else str(self.path),
            kernel_of=lambda device, config, tokens: "narrow",
            time_kernels=self.time_kernels,
        )

    def time_kernels(
        self, device: str, config: MoeConfig, tokens: int, repetitions: int
    ) -> list[tuple[str, list[float]]]:
        self.seen.append((config, tokens))
        return [
            (name, [time + noise + self.own(turn, i) for turn, noise in enumerate(self.noise)])
            for i, (name, time) in enumerate(self.times.items())
        ]

    def own(self, turn: int, kernel: int) -> float:
        return self.own_noise * ((turn + kernel) % 3)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(tmp_path / "deep" / "kernels.json")
    monkeypatch.setitem(sys.modules, "sida._cuda", made.module())
    return made


@pytest.fixture
def tune() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, ["tune", *arguments])


def choices(gpu: Gpu) -> list[dict[str, Any]]:
    assert gpu.path is not None
    table = json.loads(gpu.path.read_text())
    assert (table["format"], table["gpu"]) == ("sida-kernels", GPU)
    found: list[dict[str, Any]] = table["choices"]
    return found


def test_a_kernel_that_wins_by_more_than_the_spread_is_written(
    gpu: Gpu, tune: Callable[..., Result]
) -> None:
    result = tune(*SHAPE, "--tokens", "1,64", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["written"] and found["table"] == str(gpu.path)
    assert [row["tokens"] for row in found["rows"]] == [1, 64]
    for choice in choices(gpu):
        assert (choice["kernel"], choice["was"], choice["dtype"]) == ("hopper", "narrow", "bf16")
        assert (choice["hidden_size"], choice["intermediate_size"]) == (64, 32)
        assert (choice["experts"], choice["top_k"], choice["gated"]) == (4, 2, False)
        # what both have in common is no part of the spread
        assert choice["gain_us"] == pytest.approx(10, abs=0.2)
        assert choice["spread_us"] < 1
    assert gpu.path is not None
    assert [path.name for path in gpu.path.parent.iterdir()] == [gpu.path.name]


def test_one_that_wins_by_less_is_not(gpu: Gpu, tune: Callable[..., Result]) -> None:
    gpu.own_noise = 6
    result = tune(*SHAPE, "--tokens", "1", "--json")
    (row,) = json.loads(result.stdout)["rows"]
    assert row["fastest"] == "hopper" and row["kernel"] == "narrow" and not row["replaced"]
    assert 0 < row["gain_us"] <= row["spread_us"]
    assert gpu.path is not None and not gpu.path.exists()
    assert "nothing changes" in tune(*SHAPE, "--tokens", "1").stdout


def test_the_best_stays(gpu: Gpu, tune: Callable[..., Result]) -> None:
    gpu.times = {"narrow": 5.0, "hopper": 10.0}
    (row,) = json.loads(tune(*SHAPE, "--tokens", "1", "--json").stdout)["rows"]
    assert (row["kernel"], row["gain_us"], row["replaced"]) == ("narrow", 0, False)


def test_a_choice_takes_the_place_of_that_for_the_same_calls_alone(
    gpu: Gpu, tune: Callable[..., Result]
) -> None:
    assert tune(*SHAPE, "--tokens", "1,48").exit_code == 0
    gpu.times = {"narrow": 20.0, "wide": 1.0}
    # 33 and 48 tokens are both rounded up to 64
    result = tune(*SHAPE, "--tokens", "33")
    assert "Changed: 1" in result.stdout
    assert tune(*SHAPE, "--gated", "--tokens", "33").exit_code == 0
    assert [(c["gated"], c["tokens"], c["kernel"]) for c in choices(gpu)] == [
        (False, 1, "hopper"),
        (False, 33, "wide"),
        (True, 33, "wide"),
    ]


def test_a_dry_run_writes_nothing(gpu: Gpu, tune: Callable[..., Result]) -> None:
    result = tune(*SHAPE, "--tokens", "1", "--dry-run")
    assert result.exit_code == 0
    assert "hopper, was narrow" in result.stdout and "nothing is written" in result.stdout
    assert gpu.path is not None and not gpu.path.parent.exists()


def test_without_a_place_for_the_table_only_a_dry_run_works(
    gpu: Gpu, tune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.path = None
    refused = tune(*SHAPE, "--tokens", "1")
    assert refused.exit_code == 2 and "SIDA_KERNEL_TABLE" in refused.stderr
    assert not gpu.seen
    assert tune(*SHAPE, "--tokens", "1", "--dry-run").exit_code == 0


def test_the_shape_is_a_models_or_given(gpu: Gpu, tune: Callable[..., Result]) -> None:
    model = Path(__file__).parents[2] / "models" / "wordnet-switch-32"
    assert tune(str(model), "--tokens", "3,3", "--dry-run", "--dtype", "f16").exit_code == 0
    ((config, tokens),) = gpu.seen
    assert (config.experts, config.dtype, config.gated, tokens) == (32, "f16", False, 3)
    for arguments, words in (
        ([str(model), "--experts", "8"], "got both"),
        ([str(model), "--gated"], "--gated"),
        (["/nowhere"], "nothing at /nowhere"),
        (SHAPE[2:], "missing: --hidden-size"),
        ([*SHAPE, "--tokens", "1,x"], "whole numbers above 0"),
        ([*SHAPE, "--tokens", "0"], "whole numbers above 0"),
        ([*SHAPE, "--dtype", "f8"], "f8"),
    ):
        result = tune(*arguments)
        assert result.exit_code == 2
        assert words in result.stderr


def test_without_a_gpu_it_says_so(
    tune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = tune(*SHAPE)
    assert result.exit_code == 1
    assert "device='cpu'" in result.stderr and "Traceback" not in result.output
