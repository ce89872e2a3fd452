# SPDX-License-Identifier: Apache-2.0
"""Makes the data set: a tokenizer, and texts as tokens, split into training and held-out parts.

Fetches Debian packages and unpacks them without installing them. What it writes is all that
training needs, so a machine without a network can train on a copy of the folder.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from decoder import TEXTS
from shared import is_held_out, write_json
from texts import KINDS, read_texts

END, MASK = "[END]", "[MASK]"
EXCERPTS, EXCERPT_TOKENS = 8, 160
"""Of each kind's held-out text: what goes along with the model, for examples and measurements."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; id 0 is ``[END]``, between texts, and id 1 is ``[MASK]``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        mask_token=MASK,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All texts as one row of uint16 ids, each behind an ``[END]``."""
    rows = tokenizer(list(texts))["input_ids"] if texts else []
    end = tokenizer.eos_token_id
    return np.array([i for row in rows for i in (end, *row)], dtype=np.uint16)


def excerpts(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Some stretches of a row of ids, each from the beginning of a text."""
    begins = np.flatnonzero(ids[:-EXCERPT_TOKENS] == tokenizer.eos_token_id)
    chosen = begins[:: max(1, len(begins) // EXCERPTS)][:EXCERPTS]
    return [str(tokenizer.decode(ids[i + 1 : i + EXCERPT_TOKENS].tolist())) for i in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=TEXTS, help="output folder")
    parser.add_argument(
        "--downloads",
        type=Path,
        default=Path(tempfile.gettempdir()) / "sida-texts",
        help="where packages are unpacked",
    )
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args(arguments)

    texts = {kind: read_texts(kind, options.downloads) for kind in KINDS}
    parts = {
        kind: (
            [text for text in all_ if not is_held_out(text)],
            [text for text in all_ if is_held_out(text)],
        )
        for kind, all_ in texts.items()
    }
    for train, held_out in parts.values():
        random.Random(0).shuffle(train)
        random.Random(0).shuffle(held_out)
    tokenizer = train_tokenizer(
        (text for train, _ in parts.values() for text in train), vocab_size=options.vocab_size
    )
    options.data.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(options.data)
    sizes, shown = {}, []
    for kind, (train, held_out) in parts.items():
        arrays = {"train": tokens_of(train, tokenizer), "held_out": tokens_of(held_out, tokenizer)}
        for part, ids in arrays.items():
            np.save(options.data / f"{part}-{kind}.npy", ids)
        sizes[kind] = {
            "training texts": len(train),
            "training tokens": len(arrays["train"]),
            "held-out texts": len(held_out),
            "held-out tokens": len(arrays["held_out"]),
            "held-out characters": sum(map(len, held_out)),
        }
        print(kind, sizes[kind])
        shown += [{"kind": kind, "text": text} for text in excerpts(arrays["held_out"], tokenizer)]
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in shown]
    (options.data / "excerpts.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(options.data / "sizes.json", sizes)


if __name__ == "__main__":
    main()
