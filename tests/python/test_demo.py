# SPDX-License-Identifier: Apache-2.0
"""The demonstration: its figures, its sentence, its picture, and the checkpoint of --scale."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sida.cli import scale
from sida.cli.app import app
from sida.cli.demo import in_a_sentence, show
from sida.cli.locate import draw_sentences, find_model
from sida.cli.output import Failure
from sida.cli.processes import Apart

MODEL = Path(__file__).parents[2] / "models" / "wordnet-switch-32"
COUNT = 24


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(
        app, ["demo", *(str(argument) for argument in arguments)]
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("matplotlib")
    plot = tmp_path_factory.mktemp("demo") / "plot.png"
    done = run("--sentences", COUNT, "--seed", 3, "--plot", plot, "--json")
    assert done.exit_code == 0, done.output
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@pytest.fixture(scope="module")
def reference() -> Any:
    """Class logits by transformers alone."""
    from safetensors.torch import load_file

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, several wait for each other for long
    head = load_file(MODEL / "head.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.SwitchTransformersEncoderModel.from_pretrained(MODEL).eval()
    logits = []
    for sentence in draw_sentences(MODEL, COUNT, seed=3):
        batch = tokenizer(sentence.text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(input_ids=batch["input_ids"]).last_hidden_state
        logits.append(hidden[0].mean(0) @ head["weight"].T + head["bias"])
    torch.set_num_threads(threads)
    return torch.stack(logits)


def test_accuracy_is_that_of_the_model_by_itself(result: dict[str, Any], reference: Any) -> None:
    labels = torch.tensor([s.label for s in draw_sentences(MODEL, COUNT, seed=3)])
    expected = float((reference.argmax(-1) == labels).double().mean())
    assert expected > 0.5
    assert result["ways"][0]["accuracy"] == result["ways"][1]["accuracy"] == expected


def test_exact_routing_under_a_budget_gives_the_same_bits(result: dict[str, Any]) -> None:
    resident, exact, predicted = result["ways"]
    assert (resident["fidelity"], exact["fidelity"]) == (1.0, 1.0)
    assert exact["identical"] and not predicted["identical"]
    assert predicted["fidelity"] >= 0.8


def test_the_budget_is_a_fifth_of_the_experts(result: dict[str, Any]) -> None:
    resident, *limited = result["ways"]
    assert resident["experts_resident"] == resident["experts_total"] == 128
    assert resident["hit_rate"] == 1.0 and resident["bytes_moved"] == 0
    for way in limited:
        assert way["experts_resident"] == 25
        one_expert = resident["expert_bytes"] // 128
        assert 25 * one_expert <= way["expert_bytes"] <= 26 * one_expert  # with staging
        assert way["bytes_moved"] > 0


def test_figures_agree_with_each_other(result: dict[str, Any]) -> None:
    assert (result["sentences"], result["batch_size"]) == (COUNT, 8)
    for way in result["ways"]:
        assert way["hits"] + way["late"] + way["misses"] == way["uses"] > 0
        assert way["hit_rate"] == way["hits"] / way["uses"]
        assert sum(layer["uses"] for layer in way["layers"]) == way["uses"]
        assert way["sentences_per_second"] == pytest.approx(COUNT / way["seconds"])
        assert way["tokens_per_second"] == pytest.approx(result["tokens"] / way["seconds"])
        assert 0 < way["latency_p50_seconds"] <= way["latency_p95_seconds"] <= way["seconds"]
        assert way["process_peak_bytes"] > way["expert_bytes"]
    assert {layer["routing"] for layer in result["ways"][2]["layers"]} == {"predicted"}


def test_the_plot_is_a_picture(result: dict[str, Any]) -> None:
    from matplotlib.image import imread

    pixels = imread(result["plot"])
    assert pixels.shape[0] > 600 and pixels.shape[1] > 800
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50


def test_the_report_fits_80_columns(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show({**result, "model": "models/wordnet-switch-32", "plot": None})
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for row in ("accuracy", "fidelity", "p50", "p95", "hit rate", "stall", "peak memory"):
        assert row in text
    assert " ".join(result["summary"].split()) in " ".join(text.split())


def way(**figures: Any) -> dict[str, Any]:
    common = {"experts_resident": 25, "experts_total": 128, "identical": True, "fidelity": 1.0}
    common |= {"expert_bytes": 25 << 20, "latency_p50_seconds": 0.01, "accuracy": 0.8}
    return common | figures


def test_the_sentence_is_made_of_the_figures() -> None:
    resident = way(expert_bytes=128 << 20, latency_p50_seconds=0.02)
    predicted = way(identical=False, fidelity=0.95, accuracy=0.75, latency_p50_seconds=0.015)
    text = in_a_sentence([resident, way(), predicted], 100)
    assert "25 of 128 experts (25.0 MiB instead of 128.0 MiB)" in text
    assert "all 100 sentences the same class, with logits equal to the bit" in text
    assert "10.0 ms a batch where all resident took 20.0 ms" in text
    assert "changed 5 of 100 answers, moved accuracy from 80.0 % to 75.0 %" in text
    assert "15.0 ms" in text
    worse = in_a_sentence([resident, way(identical=False, fidelity=0.99), predicted], 100)
    assert "99 of 100 sentences" in worse and "to the bit" not in worse


def test_a_timeline_shows_the_usual_batches() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from sida.cli.plot import plot_timeline

    def event(kind: str, begin: float, length: float, thread: int) -> dict[str, Any]:
        return {"cat": kind, "ts": 1000 * begin, "dur": 1000 * length, "tid": thread}

    trace = [event("pass", 10 * i, 9, 2) for i in range(4)]
    trace.append(event("pass", 900, 9, 2))  # after a pause, which is not usual
    trace += [event("compute", 12, 2, 1), event("stall", 14, 1, 1)]
    trace += [event("prefetch", 11, 2, 4), event("demand load", 13, 1, 5)]
    axes = Figure().subplots()
    plot_timeline(axes, trace, batches=2)
    assert axes.get_xlim() == pytest.approx((0, 19))
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["batches", "MoE layers", "transfers 1", "transfers 2", "hash building"]
    assert "ms" in axes.get_xlabel()
    empty = Figure().subplots()
    plot_timeline(empty, [])


def test_sentences_are_drawn_by_seed() -> None:
    first = draw_sentences(MODEL, 5, seed=1)
    assert first == draw_sentences(MODEL, 5, seed=1) != draw_sentences(MODEL, 5, seed=2)
    assert len(draw_sentences(MODEL, 10**6)) == 7602


def test_the_model_is_found_from_below_and_missed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sida

    monkeypatch.setattr(sida, "__path__", [str(tmp_path)])
    monkeypatch.chdir(MODEL.parents[1] / "tests" / "python")
    assert find_model() == MODEL
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="--model"):
        find_model()
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing: model\.safetensors \(the encoder\)"):
        find_model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], "missing: config.json"),
        (["--memory", "0.001"], "smallest valid value"),
        (["--sentences", "0"], "--sentences"),
        (["--plot", "nowhere/plot.png"], "expected a folder"),
        (["--plot", "plot.txt"], ".png, .pdf or .svg"),
        (["--scale", "switch-base-7"], "switch-base-64"),
        (["--scale", "switch-base-8", "--memory", "0.01"], "1 of 96 experts"),
        (["--scale", "switch-base-8", "--dir", "nowhere"], "expected a folder"),
        (["--scale", "switch-base-8", "--plot", "plot.png"], "--scale"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(scale.shutil, "disk_usage", lambda folder: full)
    done = run("--scale", "switch-base-8", "--dir", tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "1.0 MiB free" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("--plot", "plot.png")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "pip install matplotlib" in done.stderr


def test_a_damaged_file_of_sentences_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "head.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(MODEL / name)
    (tmp_path / "predictor.safetensors").symlink_to(MODEL / "predictor.safetensors")
    (tmp_path / "held_out.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    done = run("--model", tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "line 2" in done.stderr and "label" in done.stderr


def count_to(limit: int) -> Generator[None, None, int]:
    for _ in range(limit):
        yield
    return os.getpid()


def refuse(message: str) -> Iterator[None]:
    yield
    raise ValueError(message)


def die() -> Iterator[None]:
    yield
    os._exit(7)


def test_work_goes_on_apart_step_by_step() -> None:
    with Apart(count_to, 2) as work:
        assert [work.step(), work.step()] == [None, None]
        result = work.step()
        assert result is not None and result[0] != os.getpid()


def test_what_work_raises_is_raised_here() -> None:
    with Apart(refuse, "no such thing") as work:
        assert work.step() is None
        with pytest.raises(ValueError, match="no such thing"):
            work.step()


def test_a_process_that_dies_is_reported() -> None:
    with Apart(die) as work:
        assert work.step() is None
        with pytest.raises(Failure, match="exit code 7"):
            work.step()


@pytest.mark.slow
def test_an_interrupt_ends_it_without_a_traceback() -> None:
    # A shell starts what runs in the background with SIGINT ignored, these tests for example.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{heed}; from sida.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", command, "demo", "--sentences", "7602"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        assert "importing" in process.stderr.readline()
        time.sleep(3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        try:
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in errors


def test_a_random_checkpoint_is_what_transformers_expects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sida.cli import random_model

    monkeypatch.setattr(random_model, "SHARD_BYTES", 100_000)
    config = random_model.switch_base(4)
    for name, value in (("d_model", 32), ("d_ff", 64), ("d_kv", 8), ("num_heads", 4)):
        setattr(config, name, value)
    config.vocab_size = 500
    layout = random_model.model_layout(config)
    steps = list(random_model.write_random_model(tmp_path, config, layout, seed=1))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(steps) == len(files) == random_model.shard_count(layout) > 2
    model, report = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    weights = {p.data_ptr(): p for p in model.parameters()}.values()
    assert random_model.layout_bytes(layout) == sum(2 * p.numel() for p in weights)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            assert (parameter == 1).all()
        elif parameter.numel() > 1000:
            assert 0.015 < float(parameter.detach().float().std()) < 0.025, name
    with torch.no_grad():
        output = model(input_ids=torch.ones(1, 4).long(), decoder_input_ids=torch.ones(1, 2).long())
    assert output.logits.isfinite().all()


@pytest.mark.slow
def test_a_large_model_runs_in_less_memory_than_its_weights(tmp_path: Path) -> None:
    done = run("--scale", "switch-base-8", "--memory", "10%", "--dir", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["all_experts_bytes"] == 12 * 8 * 2 * 768 * 3072 * 2
    assert result["experts_resident"] == 9
    assert result["expert_bytes"] <= 0.1 * result["all_experts_bytes"]
    grown = result["process_peak_bytes"] - result["process_before_bytes"]
    assert result["expert_bytes"] < grown < result["model_bytes"] * 0.75
    assert len(result["batch_seconds"]) == result["batches"]
    assert not list(tmp_path.iterdir())
