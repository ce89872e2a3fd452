# SPDX-License-Identifier: Apache-2.0
"""The command line: what commands print, as text and as JSON, and how they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import sida
from sida.cli.app import app

MODEL = Path(__file__).parents[2] / "models" / "wordnet-switch-32"
COMMANDS = ("inspect", "convert", "demo", "doctor", "tune", "replay", "train-predictor", "evaluate")


def run(*arguments: object, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}).invoke(
        app, [str(argument) for argument in arguments]
    )


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def check_failure(result: Result, code: int, *words: str) -> None:
    """A message for people on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    message = " ".join(result.stderr.split())
    for word in words:
        assert word in message
    assert "Traceback" not in message


def write_mixtral(folder: Path, *, shards: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """A checkpoint of 2 MoE layers with 3 gated experts, and an embedding."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    draw = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": draw.random((10, 8), dtype=np.float32)}
    for layer in range(2):
        for expert in range(3):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            for name, shape in (
                ("gate_proj", (16, 8)),
                ("up_proj", (16, 8)),
                ("down_proj", (8, 16)),
            ):
                tensors[f"{prefix}.{name}.weight"] = draw.random(shape, dtype=np.float32)
    (folder / "config.json").write_text(
        json.dumps({"hidden_act": "silu", "num_experts_per_tok": 2, "model_type": "qwen3_moe"})
    )
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {}
    names = sorted(tensors)
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_inspect_tells_what_a_checkpoint_holds(tmp_path: Path, shards: int) -> None:
    tensors = write_mixtral(tmp_path, shards=shards)
    found = run_json("inspect", tmp_path)
    experts = [tensor for name, tensor in tensors.items() if ".experts." in name]
    assert found["layers"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (found["experts_per_layer"], found["experts"], found["top_k"]) == (3, 6, 2)
    assert (found["hidden_size"], found["intermediate_size"]) == (8, 16)
    assert (found["activation"], found["gated"], found["dtype"]) == ("silu", True, "f32")
    assert found["expert_bytes"] == 3 * 16 * 8 * 4
    assert found["all_experts_bytes"] == sum(tensor.nbytes for tensor in experts)
    assert found["expert_parameters"] == sum(tensor.size for tensor in experts)
    assert found["other_bytes"] == 10 * 8 * 4
    assert found["other_parameters"] == 10 * 8


def test_inspect_tells_what_budgets_mean(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    rows = {row["memory"]: row for row in run_json("inspect", tmp_path)["budgets"]}
    assert {name: row["experts"] for name, row in rows.items() if "B" not in name} == {
        "1 expert": 1,
        "20%": 1,
        "50%": 3,
        "100%": 6,
    }
    for row in rows.values():
        assert row["bytes"] == row["experts"] * 1536
        assert row["share"] == row["experts"] / 6
    (row,) = run_json("inspect", tmp_path, "--memory", "4000 bytes")["budgets"]
    assert row == {"memory": "4000 bytes", "experts": 2, "bytes": 3072, "share": 1 / 3}


def test_inspect_agrees_with_the_cache_that_the_budget_makes(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    store = sida.ExpertStore.open(tmp_path, dtype="bf16")
    for memory in ("1 expert", "50%", "4000 bytes"):
        found = run_json("inspect", tmp_path, "--memory", memory, "--dtype", "bf16")
        cache = sida.ExpertCache(store, memory)
        (row,) = found["budgets"]
        assert (row["experts"], found["expert_bytes"]) == (cache.slots, cache.slot_bytes)
        assert row["bytes"] == cache.capacity_bytes


@pytest.mark.parametrize("columns", [80, 120])
def test_inspect_prints_a_report_that_fits(columns: int) -> None:
    result = run("inspect", MODEL, columns=columns)
    assert result.exit_code == 0
    for words in ("Switch Transformers", "128.0 KiB in bf16", '"20%"', "16.0 MiB", "--dtype f32"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= columns


def test_inspect_needs_no_torch() -> None:
    code = (
        "import sys; from sida.cli.app import app\n"
        f"app(['inspect', {str(MODEL)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_runs_as_a_command() -> None:
    command = [sys.executable, "-c", "from sida.cli import main; main()", "inspect"]
    good = subprocess.run(
        [*command, MODEL, "--json"], check=False, capture_output=True, text=True, timeout=60
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["experts"] == 128
    bad = subprocess.run(
        [*command, "nowhere", "--json"], check=False, capture_output=True, text=True, timeout=60
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "nowhere" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([MODEL / "nowhere"], ["found nothing at"]),
        ([MODEL / "head.safetensors"], ["expected MoE layers"]),
        ([MODEL / "held_out.jsonl"], ["safetensors"]),
        ([MODEL, "--memory", "much"], ['expected bytes ("2GiB")', '"much"']),
        ([MODEL, "--memory", "0.001"], ["the smallest valid value is 0.0078125"]),
        ([MODEL, "--memory", "1 byte"], ["Did you mean 1.0 (all experts)?"]),
        ([MODEL, "--dtype", "int4"], ["int4"]),
    ],
)
def test_inspect_refuses_what_cannot_be(arguments: list[object], words: list[str]) -> None:
    for form in ([], ["--json"]):
        check_failure(run("inspect", *arguments, *form, columns=300), 2, *words)


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"sida {sida.__version__}\n")


def test_help_names_every_command_and_fits() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)
    for command in COMMANDS:
        page = run(command, "--help")
        assert page.exit_code == 0
        assert "--json" in page.stdout
        assert f"For example: sida {command}" in " ".join(page.stdout.split())
        assert "{out}" not in page.stdout
        assert max(map(len, page.stdout.splitlines())) <= 80


def test_unknown_commands_and_options_are_usage_errors() -> None:
    for arguments in (["fly"], ["inspect"], ["inspect", MODEL, "--colour"], ["demo", "x"]):
        check_failure(run(*arguments), 2, "Usage")


def test_text_files_are_read_by_line(tmp_path: Path) -> None:
    from sida.cli.locate import read_texts

    plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("one\n\n  two \n", encoding="utf-8")
    lines.write_text('{"text": "one", "label": 3}\n\n{"text": "two"}\n', encoding="utf-8")
    assert read_texts(plain) == read_texts(lines) == ["one", "two"]
    lines.write_text('{"text": "one"}\n{"texts": "two"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: expected an object with \"text\""):
        read_texts(lines)
    lines.write_text('{"text": "one"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: expected JSON"):
        read_texts(lines)
    plain.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="found none"):
        read_texts(plain)


class TestPredictors:
    """train-predictor and evaluate."""

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """On a busy machine, torch's threads wait for each other longer than they compute."""
        torch = pytest.importorskip("torch")
        pytest.importorskip("transformers")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def texts(self, tmp_path: Path) -> Path:
        lines = (MODEL / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:24]
        path = tmp_path / "texts.txt"
        path.write_text("\n".join(json.loads(line)["text"] for line in lines), encoding="utf-8")
        return path

    def test_a_trained_predictor_is_loaded_and_measured(self, texts: Path, tmp_path: Path) -> None:
        out = tmp_path / "predictor.safetensors"
        made = run_json(
            "train-predictor",
            *(MODEL, texts, out),
            *("--kind", "token", "--steps", 3, "--batch-size", 8),
        )
        assert (made["kind"], made["steps"], made["texts"]) == ("token", 3, 24)
        assert made["heads"] == [0, 1, 2, 3] and made["bytes"] == out.stat().st_size
        assert sida.HashPredictor.load(out).kind == "token"
        measured = run_json("evaluate", MODEL, texts, "--predictor", out, "--limit", 16)
        assert measured["texts"] == 16 and len(measured["layers"]) == 4
        for name in ("top1", "top3", "coverage1", "coverage3"):
            assert all(0 <= share <= 1 for share in measured[name])

    def test_the_committed_predictor_does_better_than_a_few_steps(self, texts: Path) -> None:
        measured = run_json("evaluate", MODEL, texts)
        assert measured["predictor"] == str(MODEL / "predictor.safetensors")
        assert min(measured["top3"]) > 0.8 and measured["fidelity"] > 0.8
        report = run("evaluate", MODEL, texts)
        assert "encoder.block.7.layer.1.mlp" in report.stdout
        assert f"{100 * measured['fidelity']:.2f} %" in " ".join(report.stdout.split())

    def test_what_cannot_be_is_refused_before_anything_is_trained(
        self, texts: Path, tmp_path: Path
    ) -> None:
        def refused(*arguments: object) -> Result:
            return run(*arguments, columns=300)

        out = tmp_path / "no" / "predictor.safetensors"
        check_failure(refused("train-predictor", MODEL, texts, out), 2, "folder that exists")
        here = tmp_path / "predictor.safetensors"
        check_failure(refused("train-predictor", tmp_path, texts, here), 2, "config.json")
        check_failure(refused("train-predictor", MODEL, tmp_path / "no", here), 2, "No such file")
        check_failure(refused("train-predictor", MODEL, texts, here, "--steps", 0), 2, "--steps")
        check_failure(refused("evaluate", MODEL, texts, "--predictor", here), 2, "--predictor")
        wrong = MODEL / "head.safetensors"
        result = refused("evaluate", MODEL, texts, "--predictor", wrong)
        check_failure(result, 2, "sida-predictor")
        assert not here.exists()
