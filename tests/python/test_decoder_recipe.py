# SPDX-License-Identifier: Apache-2.0
"""The recipe of examples/train_decoder, run small on a CPU."""

from __future__ import annotations

import importlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from transformers import AutoTokenizer, OlmoeForCausalLM

import sida

RECIPE = Path(__file__).parents[2] / "examples" / "train_decoder"
SMALL = (
    "--batch-size 8 --window 16 --hidden-size 32 --intermediate-size 16 --layers 2 --heads 2 "
    "--experts 8 --top-k 2 --lr 3e-3 --device cpu --checkpoint-every 4 --token-dropout 0.1"
).split()
NOUNS = "dog cat horse bird fish bread soup cheese cake rice".split()


def run(script: str, *arguments: object) -> None:
    """What `python script.py arguments...` does, without the seconds that imports take."""
    importlib.import_module(script).main([str(a) for a in arguments])


@pytest.fixture(scope="module", autouse=True)
def recipe() -> Iterator[None]:
    """The recipe's modules can be imported, as they can by a script beside them."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(RECIPE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products are faster so
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if RECIPE.parent in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


def write_packages(folder: Path) -> None:
    """What the three packages unpack to, with a little text in them."""
    draw = random.Random(0)
    wordnet = folder / "wordnet-base/usr/share/wordnet"
    wordnet.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        lines = ["  1 This is the licence, to be skipped.  "]
        for i in range(300 if part == "noun" else 0):
            one, other = draw.sample(NOUNS, 2)
            lines.append(f"{i:08d} 05 n 02 {one} 0 {one}_{i} 0 000 | a kind of {other} {i}  ")
        (wordnet / f"data.{part}").write_text("\n".join(lines) + "\n")
    (folder / "bible-kjv-text/usr/lib").mkdir(parents=True)
    program = folder / "bible-kjv/usr/bin/bible"
    program.parent.mkdir(parents=True)
    verses = "".join(
        f"\\nBook {i}\\n\\n  1 And the word was {i}.\\n  2 Amen.\\n" for i in range(60)
    )
    program.write_text(f"#!/bin/sh\nprintf '{verses}'\n")
    program.chmod(0o755)
    manual = folder / "python3.11-doc/usr/share/doc/python3.11/html/_sources/library"
    manual.mkdir(parents=True)
    parts = [f"Part {i}\n----------\n\nCall it with ``{i}``." for i in range(300)]
    (manual / "it.rst.txt").write_text("\n\n".join(parts) + "\n")


@pytest.fixture(scope="module")
def data(recipe: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    write_packages(folder / "packages")
    with pytest.MonkeyPatch.context() as patch:
        glosses = importlib.import_module("shared") and importlib.import_module("glosses")
        patch.setattr(glosses, "INSTALLED", folder / "nowhere")
        run(
            "prepare_texts",
            "--downloads",
            folder / "packages",
            "--data",
            folder,
            "--vocab-size",
            400,
        )
    return folder


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    run("train_decoder", "--data", data, "--out", data / "unbroken", "--steps", 120, *SMALL)
    return data / "unbroken"


def test_texts_are_what_the_packages_hold(data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data)
    expected = {"dictionary": 300, "scripture": 60, "manual": 300}
    begins = {"dictionary": "(noun): a kind of", "scripture": "Book ", "manual": "Part "}
    for kind, count in expected.items():
        parts = []
        for part in ("train", "held_out"):
            ids = np.load(data / f"{part}-{kind}.npy")
            texts = tokenizer.decode(ids.tolist()).split("[END]")[1:]
            assert all(begins[kind] in text for text in texts)
            parts.append(set(texts))
        assert len(parts[0]) + len(parts[1]) == count
        assert parts[1] and not parts[0] & parts[1]


def test_excerpts_begin_where_texts_do(data: Path) -> None:
    prepare_texts = importlib.import_module("prepare_texts")
    tokenizer = AutoTokenizer.from_pretrained(data)
    texts = [f"Part {i}: a kind of bread" for i in range(400)]
    found = prepare_texts.excerpts(prepare_texts.tokens_of(texts, tokenizer), tokenizer)
    assert len(found) == len(set(found)) == prepare_texts.EXCERPTS
    for excerpt in found:
        first, *others = excerpt.split("[END]")
        begin = texts.index(first)
        assert [*others[:-1]] == texts[begin + 1 : begin + len(others)]
        assert len(tokenizer(excerpt)["input_ids"]) >= prepare_texts.EXCERPT_TOKENS - 1


def test_a_resumed_run_writes_the_same_model_as_an_unbroken_one(data: Path, trained: Path) -> None:
    out = data / "resumed"
    arguments = ("--data", data, "--out", out, "--steps", 120, *SMALL)
    run("train_decoder", *arguments, "--stop-at", 17)
    assert not (out / "model.safetensors").exists()
    run("train_decoder", *arguments)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (trained / name).read_bytes()
    figures = [json.loads((f / "metrics.json").read_text())["held_out"] for f in (out, trained)]
    assert figures[0] == figures[1]


def test_a_checkpoint_of_other_settings_is_refused(data: Path, trained: Path) -> None:
    with pytest.raises(SystemExit, match="other settings"):
        run("train_decoder", "--data", data, "--out", trained, "--steps", 61, *SMALL)


def test_the_model_loads_in_transformers_and_has_learned(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, info = OlmoeForCausalLM.from_pretrained(trained, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(trained)) == model.config.vocab_size
    run("measure_decoder", trained, "--data", data, "--window", 16)
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((trained / "metrics.json").read_text())["held_out"]
    assert figures["perplexity over all"] < 40  # of 400 tokens
    assert len(figures["experts used"]) == 2


def test_perplexity_is_that_of_transformers_own_loss(data: Path, trained: Path) -> None:
    evaluate = importlib.import_module("measure_decoder")
    model = OlmoeForCausalLM.from_pretrained(trained).eval()
    ids, following = evaluate.held_out(data, 16)["manual"]
    whole = torch.cat([ids, following[:, -1:]], 1)
    with torch.no_grad():
        loss = model(input_ids=whole, labels=whole).loss
    found = evaluate.evaluate(model, {"manual": (ids, following)}, batch_size=3)
    assert found["perplexity"]["manual"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_grouped_experts_compute_what_transformers_does(trained: Path) -> None:
    decoder = importlib.import_module("decoder")
    model = OlmoeForCausalLM.from_pretrained(trained).eval()
    model.set_experts_implementation("eager")
    ids = torch.randint(2, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with decoder.grouped_experts(model):
            grouped = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert torch.linalg.norm(grouped - expected) <= 1e-6 * torch.linalg.norm(expected)
    assert torch.equal(after, expected)


@pytest.mark.parametrize("kind", ["token", "lstm"])
def test_a_predictor_names_more_than_chance_and_serves_the_model(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    windows = ("--window", 16, "--windows", 2, "--batch-size", 4)
    script = "train_routing_predictor"
    run(script, trained, "--data", data, "--kind", kind, "--steps", 40, *windows)
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((trained / "predictor.json").read_text())
    for shares in figures["named"].values():
        assert len(shares) == 2 and min(shares) > 1.2 * 2 / 8  # of 8 experts, 2 are used

    model = OlmoeForCausalLM.from_pretrained(trained).eval()
    ids = torch.randint(2, 60, (1, 6), generator=torch.Generator().manual_seed(0))
    predictor = trained / "predictor.safetensors"
    with sida.offload(model, memory=0.5, predictor=predictor) as off, torch.no_grad():
        off.model(input_ids=ids)
        assert off.stats()["tables"] == off.stats()["passes"] == 1


def test_the_committed_model_is_what_its_card_says() -> None:
    model = RECIPE.parents[1] / "models" / "texts-olmoe-32"
    card = (model / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((model / "metrics.json").read_text())
    ngrams = json.loads((RECIPE / "ngrams.json").read_text())
    held_out, longest = metrics["held_out"], ngrams["perplexity by order"]["5"]

    for kind, perplexity in held_out["perplexity"].items():
        assert f"| {kind} | {perplexity:.2f} | {longest[kind]:.2f} |" in card
    over_all = held_out["perplexity over all"]
    assert f"| over all | **{over_all:.2f}** | {longest['over all']:.2f} |" in card
    for name in ("largest share of uses", "smallest share of uses"):
        assert f"| {', '.join(f'{100 * share:.1f}' for share in held_out[name])} |" in card
    assert f"{metrics['settings']['steps']:,} steps" in card and metrics["command"] in card
    predictor = json.loads((model / "predictor.json").read_text())
    for kind, shares in predictor["named"].items():
        assert f"| {kind} | {', '.join(f'{100 * share:.0f}' for share in shares)} |" in card

    assert over_all < ngrams["best perplexity over all"] == longest["over all"]
    assert held_out["experts used"] == [32] * 6
    assert max(held_out["largest share of uses"]) <= 0.15
    assert sum(file.stat().st_size for file in model.iterdir()) <= 24e6


def test_a_package_that_cannot_be_fetched_is_named(
    recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(100, command)

    texts = importlib.import_module("texts")
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="bible-kjv-text"):
        texts.read_texts("scripture", tmp_path)


def test_ngrams_are_kneser_neys(recipe: None) -> None:
    ngrams = importlib.import_module("ngrams")
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 6, 400) * draw.integers(0, 2, 400)
    for order in (1, 2, 3):
        model = ngrams.KneserNey(tokens, order, 8)
        for context in ([0, 0], [5, 3], [7, 7]):  # the last was never seen
            rows = [np.array([*context, last]) for last in range(8)]
            got = [model.probabilities(row)[-1] for row in rows]
            expected = [kneser_ney(tokens.tolist(), order, row.tolist(), 8) for row in rows]
            np.testing.assert_allclose(got, expected, rtol=1e-12)
            assert sum(got) == pytest.approx(1)


def kneser_ney(tokens: list[int], order: int, wanted: list[int], vocab_size: int) -> float:
    """The textbook's recursion, by counting in lists."""

    def grams(n: int) -> list[tuple[int, ...]]:
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    def distinct(gram: tuple[int, ...]) -> int:
        """How often the n-gram occurs, or how many tokens stand before it."""
        if len(gram) == order:
            return grams(order).count(gram)
        return len({g for g in set(grams(len(gram) + 1)) if g[1:] == gram})

    def probability(gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / vocab_size
        lower = probability(gram[1:])
        alike = {(*gram[:-1], last): distinct((*gram[:-1], last)) for last in range(vocab_size)}
        total = sum(alike.values())
        if total == 0:
            return lower
        counts = [distinct(g) for g in set(grams(len(gram)))]
        once, twice = counts.count(1), counts.count(2)
        discount = once / max(1, once + 2 * twice)
        followers = sum(value > 0 for value in alike.values())
        return (max(alike[gram] - discount, 0) + discount * followers * lower) / total

    return probability(tuple(wanted[-order:]))
