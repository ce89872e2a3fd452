# SPDX-License-Identifier: Apache-2.0
"""Bars for what takes long; none for what does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from switch_models import make_encoder
from transformers.utils import logging

import sida
from sida.huggingface import progress

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


def test_transformers_switch_turns_bars_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    logging.disable_progress_bar()
    offload_and_save(tmp_path)
    assert capfd.readouterr().err == ""
