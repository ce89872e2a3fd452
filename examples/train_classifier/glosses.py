# SPDX-License-Identifier: Apache-2.0
"""WordNet's glosses as a text classification set: reading, splitting, tokenizing and batching.

A gloss is the definition of a sense, with its examples; its class is the lexicographer file that
the sense is kept in (45 files: ``noun.animal``, ``verb.motion``, ``adj.all``, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recipe import unpack_debian

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")

# Names of the lexicographer files, in the order of their numbers (lexnames(5WN)).
LABELS = [
    "adj.all",
    "adj.pert",
    "adv.all",
    "noun.Tops",
    "noun.act",
    "noun.animal",
    "noun.artifact",
    "noun.attribute",
    "noun.body",
    "noun.cognition",
    "noun.communication",
    "noun.event",
    "noun.feeling",
    "noun.food",
    "noun.group",
    "noun.location",
    "noun.motive",
    "noun.object",
    "noun.person",
    "noun.phenomenon",
    "noun.plant",
    "noun.possession",
    "noun.process",
    "noun.quantity",
    "noun.relation",
    "noun.shape",
    "noun.state",
    "noun.substance",
    "noun.time",
    "verb.body",
    "verb.change",
    "verb.cognition",
    "verb.communication",
    "verb.competition",
    "verb.consumption",
    "verb.contact",
    "verb.creation",
    "verb.emotion",
    "verb.motion",
    "verb.perception",
    "verb.possession",
    "verb.social",
    "verb.stative",
    "verb.weather",
    "adj.ppl",
]

INSTALLED = Path("/usr/share/wordnet")


@dataclass(frozen=True)
class Gloss:
    """One labelled text."""

    text: str
    label: int


def find_wordnet(downloads: Path) -> Path:
    """The folder of an installed or freshly fetched WordNet database.

    Raises:
        RuntimeError: It is not installed and could not be fetched.
    """
    if (INSTALLED / "data.noun").is_file():
        return INSTALLED
    return unpack_debian("wordnet-base", downloads) / "usr/share/wordnet"


@dataclass(frozen=True)
class Sense:
    """One line of the database: a meaning, the words that have it, and where it is kept."""

    words: list[str]
    label: int
    gloss: str


def read_senses(path: Path) -> Iterator[Sense]:
    """The senses of a ``data.*`` file of WordNet 3.0, in its order.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A line is not of the form that wndb(5WN) describes.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith(" "):  # the licence, at the head of each file
            continue
        data, separator, text = line.partition(" | ")
        fields = data.split(" ")
        if not separator or len(fields) < 6 or not fields[1].isdigit():
            raise ValueError(f"{path}:{number}: expected 'offset file ... | gloss'")
        label = int(fields[1])
        if label >= len(LABELS):
            raise ValueError(f"{path}:{number}: lexicographer file {label} is not in 0..44")
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        yield Sense(words, label, " ".join(text.split()))


def read_wordnet(folder: Path) -> list[Gloss]:
    """All glosses of a WordNet 3.0 database, in the order of its ``data.*`` files.

    Args:
        folder: Where ``data.noun``, ``data.verb``, ``data.adj`` and ``data.adv`` are.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A line is not of the form that wndb(5WN) describes.
    """
    return [
        Gloss(sense.gloss, sense.label)
        for part in PARTS_OF_SPEECH
        for sense in read_senses(folder / f"data.{part}")
    ]


def write_jsonl(path: Path, glosses: Sequence[Gloss]) -> None:
    """Writes one ``{"text": ..., "label": ...}`` a line."""
    with path.open("w", encoding="utf-8") as file:
        for gloss in glosses:
            record = {"text": gloss.text, "label": gloss.label}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Gloss]:
    """What `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Gloss(**json.loads(line)) for line in file]


@dataclass(frozen=True)
class Encoded:
    """Tokenized texts: int64 ``ids`` [N, longest] (0 = pad), ``lengths`` [N] and ``labels`` [N]."""

    ids: Tensor
    lengths: Tensor
    labels: Tensor

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(input_ids, attention_mask, labels)`` of some texts, cut to the longest of them.

        The length is rounded up to a multiple of 8, so that few different shapes occur.
        """
        lengths = self.lengths[index]
        longest = min(self.ids.shape[1], -(-int(lengths.max()) // 8) * 8)
        mask = torch.arange(longest) < lengths[:, None]
        return self.ids[index, :longest], mask.long(), self.labels[index]


def encode(tokenizer: object, glosses: Sequence[Gloss]) -> Encoded:
    """Tokenizes texts with a transformers tokenizer, cut to its ``model_max_length``."""
    rows = tokenizer([g.text for g in glosses], truncation=True)["input_ids"]  # type: ignore[operator]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return Encoded(ids, lengths, torch.tensor([g.label for g in glosses]))


def epoch_batches(lengths: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The index batches of one epoch, a function of ``seed`` and ``epoch`` alone.

    Texts are shuffled, then sorted by length within pools of 16 batches, so that a batch holds
    texts of about one length and little of it is padding; what fills no whole batch is left out.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator)
    batches: list[Tensor] = []
    for pool in torch.split(order, 16 * batch_size):
        by_length = pool[lengths[pool].argsort(stable=True)]
        batches += [b for b in torch.split(by_length, batch_size) if len(b) == batch_size]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def training_batches(lengths: Tensor, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Endless index batches from step ``start`` on: the same ones as a run that began at step 0.

    Raises:
        ValueError: There are fewer texts than one batch holds.
    """
    per_epoch = len(epoch_batches(lengths, batch_size, seed, 0))
    if per_epoch == 0:
        raise ValueError(
            f"a batch of {batch_size} needs as many texts, but there are {len(lengths)}"
        )
    epoch, skip = divmod(start, per_epoch)
    while True:
        yield from epoch_batches(lengths, batch_size, seed, epoch)[skip:]
        epoch, skip = epoch + 1, 0
