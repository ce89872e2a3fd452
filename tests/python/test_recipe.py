# SPDX-License-Identifier: Apache-2.0
"""The recipe of examples/train_classifier, run small on a CPU."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from transformers import AutoTokenizer, SwitchTransformersEncoderModel

RECIPE = Path(__file__).parents[2] / "examples" / "train_classifier"
SMALL = [
    "--batch-size",
    "32",
    "--d-model",
    "32",
    "--d-ff",
    "64",
    "--layers",
    "4",
    "--experts",
    "8",
    "--lr",
    "3e-3",
    "--device",
    "cpu",
    "--checkpoint-every",
    "4",
    "--dropout",
    "0.1",
    "--token-dropout",
    "0.1",
]

WORDS = {5: "dog cat horse bird fish", 13: "bread soup cheese cake rice", 28: "hour day week year"}


def write_wordnet(folder: Path) -> None:
    """A database of WordNet's form whose glosses give their class away."""
    draw = random.Random(0)
    folder.mkdir()
    for part in ("noun", "verb", "adj", "adv"):
        lines = ["  1 This is the licence, to be skipped.  "]
        for i in range(400 if part == "noun" else 0):
            label = draw.choice(list(WORDS))
            words = draw.choices(WORDS[label].split(), k=draw.randint(2, 6))
            lines.append(f"{i:08d} {label:02d} n 01 word 0 000 | a {' or '.join(words)} {i}  ")
        (folder / f"data.{part}").write_text("\n".join(lines) + "\n")


def run(script: str, *arguments: object) -> None:
    """What `python script.py arguments...` does, without the seconds that imports take."""
    importlib.import_module(script).main([str(a) for a in arguments])


@pytest.fixture(scope="module", autouse=True)
def recipe() -> Iterator[None]:
    """The recipe's modules can be imported, as they can by a script beside them."""
    sys.path.insert(0, str(RECIPE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products are faster so
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(RECIPE))
    for path in RECIPE.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def data(recipe: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_wordnet(folder / "dict")
    run("prepare", "--wordnet", folder / "dict", "--data", folder / "data", "--vocab-size", 400)
    return folder / "data"


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    out = data.parent / "unbroken"
    run("train", "--data", data, "--out", out, "--steps", 30, *SMALL)
    return out


def test_the_split_is_by_text_and_holds_all_glosses(data: Path) -> None:
    parts = [
        {json.loads(line)["text"] for line in (data / name).read_text().splitlines()}
        for name in ("train.jsonl", "held_out.jsonl")
    ]
    assert len(parts[0]) + len(parts[1]) == 400
    assert parts[1] and not parts[0] & parts[1]


def test_a_resumed_run_writes_the_same_model_as_an_unbroken_one(data: Path, trained: Path) -> None:
    out = data.parent / "resumed"
    arguments = ("--data", data, "--out", out, "--steps", 30, *SMALL)
    run("train", *arguments, "--stop-at", 17)
    assert not (out / "model.safetensors").exists()
    run("train", *arguments)
    for name in ("model.safetensors", "head.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    figures = [json.loads((f / "metrics.json").read_text())["held_out"] for f in (out, trained)]
    assert figures[0] == figures[1]


def test_a_checkpoint_of_other_settings_is_refused(data: Path, trained: Path) -> None:
    with pytest.raises(SystemExit, match="other settings"):
        run("train", "--data", data, "--out", trained, "--steps", 31, *SMALL)


def test_the_model_loads_in_transformers_and_has_learned(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, info = SwitchTransformersEncoderModel.from_pretrained(
        trained, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert encoder.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(trained)) == encoder.config.vocab_size
    run("evaluate", trained, data / "held_out.jsonl")
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((trained / "metrics.json").read_text())["held_out"]
    assert figures["accuracy"] > 0.9
    assert len(figures["experts used"]) == 2


def test_grouped_experts_compute_what_transformers_does(trained: Path) -> None:
    grouped_experts = importlib.import_module("grouped_experts").grouped_experts

    encoder = SwitchTransformersEncoderModel.from_pretrained(trained).eval()
    ids = torch.randint(2, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(input_ids=ids).last_hidden_state
        with grouped_experts(encoder):
            grouped = encoder(input_ids=ids).last_hidden_state
        after = encoder(input_ids=ids).last_hidden_state
    assert torch.linalg.norm(grouped - expected) <= 1e-6 * torch.linalg.norm(expected)
    assert torch.equal(after, expected)


def test_the_committed_model_is_what_its_card_says() -> None:
    model = RECIPE.parents[1] / "models" / "wordnet-switch-32"
    card = (model / "README.md").read_text(encoding="utf-8")
    held_out = json.loads((model / "metrics.json").read_text())["held_out"]
    predictor = json.loads((model / "predictor.json").read_text())
    linear = json.loads((RECIPE / "baseline.json").read_text())["best accuracy"]

    def percents(shares: list[float]) -> str:
        return ", ".join(f"{100 * share:.1f}" for share in shares)

    assert f"**{100 * held_out['accuracy']:.2f} %**" in card and f"{100 * linear:.2f} %" in card
    assert f"| {percents(held_out['largest share of tokens'])} |" in card
    lstm = predictor["lstm kind, not committed"]
    for top in ("top1", "top3"):
        assert f"| {percents(predictor[top])} | {percents(lstm[top])} |" in card
    assert f"| {100 * predictor['accuracy kept']:.2f} % |" in card

    assert held_out["accuracy"] > linear
    assert len(held_out["experts used"]) >= 4 and min(held_out["experts used"]) >= 0.75 * 32
    assert max(held_out["largest share of tokens"]) <= 0.15
    assert all(t >= goal for t, goal in zip(predictor["top3"], (0.93, 0.84, 0.8, 0.8), strict=True))
    assert predictor["accuracy kept"] >= 0.995
    assert sum(file.stat().st_size for file in model.iterdir()) <= 32e6
