# SPDX-License-Identifier: Apache-2.0
"""Finding the committed model, and reading texts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sida

MODEL = Path("models") / "wordnet-switch-32"
PARTS = {
    "config.json": "the config of the encoder",
    "model.safetensors": "the encoder",
    "head.safetensors": "the classifier's head",
    "tokenizer.json": "the tokenizer",
    "held_out.jsonl": "sentences with their labels",
    "predictor.safetensors": "the predictor",
}


@dataclass(frozen=True)
class Sentence:
    """A text and its class."""

    text: str
    label: int


def find_model(path: Path | None = None) -> Path:
    """Return the folder of a classifier that the demonstration can run.

    Args:
        path: Where it is; by default the model that comes with sida's source, looked for from the
            current folder and from the package upwards.

    Raises:
        FileNotFoundError: It is not there, or not complete.
    """
    if path is None:
        starts = [Path.cwd(), *(Path(folder).resolve() for folder in sida.__path__)]
        for folder in (above for start in starts for above in (start, *start.parents)):
            if (folder / MODEL / "config.json").is_file():
                path = folder / MODEL
                break
        else:
            raise FileNotFoundError(
                f"{MODEL} is not here: it comes with sida's source, not with the installed "
                "package; run this inside a clone, or pass the model's folder with --model"
            )
    missing = [f"{name} ({what})" for name, what in PARTS.items() if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"expected in {path} a classifier laid out as {MODEL} is; missing: "
            + ", ".join(missing)
        )
    return path


def draw_sentences(model: Path, count: int, seed: int = 0) -> list[Sentence]:
    """Return `count` of a model's held-out sentences, drawn at random; all if there are fewer."""
    path = model / "held_out.jsonl"
    with path.open(encoding="utf-8") as file:
        sentences = [_labelled(line, f"{path}, line {i}") for i, line in enumerate(file, 1)]
    return random.Random(seed).sample(sentences, min(count, len(sentences)))


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file: one a line, or in a .jsonl file each line's "text".

    Raises:
        ValueError: There are none, or a line is not what it should be.
    """
    texts = [text for text in _lines(path) if text]
    if not texts:
        raise ValueError(f"expected texts in {path}, found none")
    return texts


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if path.suffix != ".jsonl":
                yield line.strip()
            elif line.strip():
                yield _text_of(line, f"{path}, line {number}")


def _text_of(line: str, where: str) -> str:
    text = _row(line, where).get("text")
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected an object with "text", got {line.strip()[:60]}')
    return text.strip()


def _labelled(line: str, where: str) -> Sentence:
    label = _row(line, where).get("label")
    if not isinstance(label, int):
        raise ValueError(f'{where}: expected a whole number as "label", got {line.strip()[:60]}')
    return Sentence(_text_of(line, where), label)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON: {error}") from error
    return row if isinstance(row, dict) else {}
