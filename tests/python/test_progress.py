# SPDX-License-Identifier: Apache-2.0
"""Bars for what takes long; none for what does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from switch_models import make_encoder
from transformers.utils import logging

import sida
from sida.huggingface import engine, progress

BARS = ("Moving experts to a file", "Saving weights", "Reading experts back")


@pytest.fixture(autouse=True)
def bars_are_on() -> Iterator[None]:
    """Whatever other tests in this process have done to transformers' switch."""
    were_on = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    (logging.enable_progress_bar if were_on else logging.disable_progress_bar)()


def offload_and_save(folder: Path) -> None:
    model = make_encoder()
    with sida.offload(model, memory=0.25):
        model.save_pretrained(folder)


def test_short_work_shows_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert progress.DELAY == 1.0
    offload_and_save(tmp_path)
    shown = capfd.readouterr().err
    assert not any(bar in shown for bar in BARS)


def test_long_work_shows_how_far_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    threads = threading.active_count()
    offload_and_save(tmp_path)
    shown = capfd.readouterr().err
    for bar in BARS:
        assert f"{bar}: 100%" in shown
    assert "192k/192k" in shown  # the experts
    assert (
        threading.active_count() <= threads + 1
    )  # transformers' own bars have a thread, ours none


class FakeCache:
    """Fills pinned memory as a cache of a GPU does, and counts what it is asked for."""

    calls: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, store: Any, memory: Any, **options: Any) -> None:
        self.calls.append(options)
        if report := options.get("report"):
            for expert in range(1, 5):
                report(expert << 20, 4 << 20)


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_filling_pinned_memory_for_a_gpu_shows_how_far_it_is(
    delay: float, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", delay)
    monkeypatch.setattr(engine, "ExpertCache", FakeCache)
    monkeypatch.setattr(FakeCache, "calls", [])
    store: Any = object()
    engine.Place("cuda:1", "2GiB").cache(store, 0.5, "lru")
    shown = capfd.readouterr().err
    assert ("Pinning experts: 100%" in shown and "4.00M/4.00M" in shown) == (delay == 0)
    assert (shown == "") == (delay > 0)
    engine.Place("cpu").cache(store, 0.5, "lru")
    assert capfd.readouterr().err == ""
    gpu, cpu = FakeCache.calls
    assert gpu["device"] == "cuda:1" and gpu["host_memory"] == "2GiB"
    assert cpu == {"policy": "lru"}


def test_transformers_switch_turns_bars_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    logging.disable_progress_bar()
    offload_and_save(tmp_path)
    assert capfd.readouterr().err == ""
