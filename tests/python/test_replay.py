# SPDX-License-Identifier: Apache-2.0
"""`sida replay` foretells what runs of the real model do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sida
from sida.cli.app import app
from sida.cli.replay import load_recording
from sida.huggingface.adapter import find_adapter
from sida.huggingface.engine import CheckpointExperts, Place
from sida.huggingface.handle import Offloaded
from sida.huggingface.look_ahead import LookAhead
from sida.huggingface.tables import open_tables

transformers = pytest.importorskip("transformers")

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "models" / "wordnet-switch-32"
TRACE = REPOSITORY / "benchmarks" / "traces" / "wordnet-switch-32.safetensors"
POLICIES = ["auto", "lru", "lfu", "fifo"]
LINK = "10485760B/s"


def run(*arguments: str | int | Path) -> str:
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 2
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    # Two words a batch: a layer needs no more experts than are read at once, so that it does not
    # matter which of two reads that end together is the first. No two policies move the same bytes.
    generator = torch.Generator().manual_seed(1)
    batches = []
    for batch in range(14):
        ids = torch.randint(3, 30, (1, 2), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 1] = batch % 5 != 4  # padding is computed too, and so it is brought
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_and_stall_of_a_run_without_tables_are_foretold(
    policy: str, batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    check_against_runs(batches, tmp_path / "trace.safetensors", policy=policy)


def test_bytes_and_stall_of_a_run_with_tables_are_foretold(
    batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    with slow_encoder("auto") as off:
        table = tmp_path / "table.safetensors"
        list(off.map(batches))
        off.record(table)
    check_against_runs(batches, tmp_path / "trace.safetensors", policy="auto", table=table)


def check_against_runs(
    batches: list[dict[str, torch.Tensor]], trace: Path, *, policy: str, table: Path | None = None
) -> None:
    """Hold `sida replay` of what a run recorded against the run.

    Bringing an expert takes many times as long as computing it, so the link and not the machine
    sets the pace. A machine that stops this process for long beside that still makes a run of its
    own, and so one of a few has to agree.
    """
    ahead = 0 if table is None else 16
    options = ("--memory", "20%", "--policy", policy, "--ahead", ahead, "--bandwidth", LINK)
    seen = []
    for _ in range(6):
        with slow_encoder(policy, table) as off:
            list(off.map(batches, ahead=max(1, ahead)))
            off.record(trace)
            stats = off.stats()
        (row,) = json.loads(run(trace, *options, "--json"))["rows"]
        assert (row["slots"], row["uses"]) == (stats["slots"], stats["uses"])
        seen.append([(of["bytes_moved"], of["stall_seconds"]) for of in (row, stats)])
        (foretold_bytes, foretold_stall), (real_bytes, real_stall) = seen[-1]
        if foretold_bytes == real_bytes and abs(foretold_stall - real_stall) <= 0.1 * real_stall:
            return
    pytest.fail(f"(bytes, stall) foretold and real: {seen}")


def slow_encoder(policy: str, table: Path | None = None) -> Offloaded:
    """Return a handle on the model whose experts come over a link that takes 25 ms for one."""
    model = transformers.SwitchTransformersEncoderModel.from_pretrained(MODEL).eval()
    adapter = find_adapter(model)
    store = sida.ExpertStore.open(
        MODEL, layers=adapter.layer_names, dtype="f32", config=adapter.config("f32")
    )
    rate = store.slab_bytes / 0.025
    assert f"{rate:.0f}B/s" == LINK
    return Offloaded(
        model,
        adapter,
        CheckpointExperts(store.throttled(bytes_per_second=rate), Place("cpu")),
        memory="20%",
        routing="exact",
        tables=open_tables(table, adapter),
        look_ahead=LookAhead(adapter, wanted=False),
        policy=policy,
        threads=None,
        skip_padding=False,
        device="cpu",
    )


def test_every_combination_is_a_row_and_holds_together(tmp_path: Path) -> None:
    picture = tmp_path / "replay.png"
    found = json.loads(
        run(
            *(TRACE, "--memory", "10%,0.5,12 experts", "--policy", ",".join(POLICIES)),
            *("--ahead", "0,1,16", "--bandwidth", "500MB/s,2GiB/s", "--plot", picture, "--json"),
        )
    )
    rows = found["rows"]
    assert len(rows) == 3 * 4 * 3 * 2
    assert picture.stat().st_size > 10_000
    for row in rows:
        assert row["hits"] + row["late"] + row["misses"] == row["uses"]
        assert row["bytes_moved"] == row["loads"] * load_recording(TRACE).expert_bytes
        assert row["times_belady"] >= 1
    of = {(r["memory"], r["policy"], r["ahead"], r["bytes_per_second"]): r for r in rows}
    for memory in ("10%", "0.5"):
        for ahead in (0, 1, 16):
            slow, fast = of[memory, "auto", ahead, 5e8], of[memory, "auto", ahead, 2 * 2.0**30]
            assert slow["stall_seconds"] > fast["stall_seconds"] > 0
        assert of[memory, "auto", 16, 5e8]["times_belady"] <= 1.10
        assert of[memory, "auto", 0, 5e8]["bytes_moved"] == min(
            of[memory, policy, 0, 5e8]["bytes_moved"] for policy in POLICIES
        )


def test_a_predictors_tables_fall_between_none_and_perfect_ones() -> None:
    foretold = TRACE.with_name("wordnet-switch-32.foretold.safetensors")
    options = ("--memory", "20%", "--bandwidth", "500MB/s", "--json")
    none, perfect = json.loads(run(TRACE, "--ahead", "0,16", *options))["rows"]
    (predicted,) = json.loads(run(TRACE, "--foretold", foretold, "--ahead", "16", *options))["rows"]
    for name in ("stall_seconds", "misses"):
        assert perfect[name] < predicted[name] < none[name]
    # What unsure tables bring early may cost a few bytes.
    assert perfect["bytes_moved"] < predicted["bytes_moved"] < 1.05 * none["bytes_moved"]


def test_what_people_read_names_every_column() -> None:
    text = run(TRACE, "--memory", "20%", "--bandwidth", "2GB/s")
    assert "128 experts of 256.0 KiB" in text and "stall" in text
    assert "stall" not in run(TRACE, "--memory", "20%")


def test_nothing_is_cut_off_on_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    everything = ("--policy", "auto,lookahead", "--bandwidth", "500MB/s,2GB/s", "--memory", "20%")
    text = run(TRACE, *everything)
    for column in ("memory", "policy", "experts", "ahead", "misses", "moved", "GB/s", "stall"):
        assert column in text
    assert "…" not in text
    assert "; policy auto; GB/s 2" in run(TRACE, "--bandwidth", "2GB/s")


def test_what_is_said_twice_is_replayed_once() -> None:
    options = ("--memory", "20%,20%", "--policy", "lru, lru", "--ahead", "0,0", "--json")
    assert len(json.loads(run(TRACE, *options))["rows"]) == 1


def test_what_cannot_be_is_said_before_anything_is_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replayed, real = [], sida.replay

    def replay(routing: sida.HashTable, *args: Any, **options: Any) -> Any:
        replayed.append(len(routing))
        return real(routing, *args, **options)

    monkeypatch.setattr(sida, "replay", replay)
    error_of(TRACE, "--memory", "20%,many")
    error_of(TRACE, "--policy", "lru,best")
    assert max(replayed) == 1


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    assert "--bandwidth: expected a rate like" in error_of(TRACE, "--bandwidth", "fast")
    for wrong in ("1,x", "-1", "1.5", "", "0,"):
        assert "--ahead: expected whole numbers" in error_of(TRACE, "--ahead", wrong)
    assert "expert_bytes: expected 0 or more" in error_of(TRACE, "--expert-bytes", "-5")
    assert "times that are not negative" in error_of(TRACE, "--latency", "-1")
    assert "folder of the picture" in error_of(TRACE, "--plot", tmp_path / "none" / "x.png")
    assert "expected a picture" in error_of(TRACE, "--plot", tmp_path / "x.txt")
    assert 'got "many"' in error_of(TRACE, "--memory", "20%,many")
    assert "policy: expected fifo" in error_of(TRACE, "--policy", "belady")
    assert "smallest" in error_of(TRACE, "--memory", "0 experts")
    other = TRACE.with_name("wordnet-probe-32.safetensors")
    assert "other batches" in error_of(TRACE, "--foretold", other)
    bare = tmp_path / "bare.safetensors"
    sida.HashTable.load(TRACE).save(bare)
    assert "--expert-bytes" in error_of(bare)
    assert json.loads(run(bare, "--expert-bytes", "1000", "--json"))["rows"]
    bare.write_bytes(b"no table")
    result = CliRunner().invoke(app, ["replay", str(bare)])
    assert result.exit_code == 2 and "bare.safetensors" in result.stderr
