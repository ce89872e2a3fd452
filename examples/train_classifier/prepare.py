# SPDX-License-Identifier: Apache-2.0
"""Makes the data set: WordNet's glosses split into training and held-out parts, and a tokenizer.

Reads an installed WordNet (Debian's ``wordnet-base``), or fetches that package and unpacks it
without installing it. Writes ``train.jsonl``, ``held_out.jsonl`` and the tokenizer's files.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from glosses import LABELS, find_wordnet, read_jsonl, read_wordnet, write_jsonl
from recipe import is_held_out


def train_tokenizer(
    texts: Sequence[str], *, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer; id 0 is ``[PAD]``, id 1 is ``[MASK]``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]", "[MASK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=max_length,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".data/wordnet"), help="output folder")
    parser.add_argument("--wordnet", type=Path, help="folder of data.noun, ... (default: find it)")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--max-length", type=int, default=64, help="tokens a text is cut to")
    options = parser.parse_args(arguments)

    source = options.wordnet or find_wordnet(Path(tempfile.gettempdir()) / "sida-wordnet")
    glosses = read_wordnet(source)
    options.data.mkdir(parents=True, exist_ok=True)
    write_jsonl(options.data / "train.jsonl", [g for g in glosses if not is_held_out(g.text)])
    write_jsonl(options.data / "held_out.jsonl", [g for g in glosses if is_held_out(g.text)])
    train = read_jsonl(options.data / "train.jsonl")
    tokenizer = train_tokenizer(
        [g.text for g in train], vocab_size=options.vocab_size, max_length=options.max_length
    )
    tokenizer.save_pretrained(options.data)
    print(
        f"{len(train)} training and {len(glosses) - len(train)} held-out glosses of {len(LABELS)} "
        f"classes in {options.data}"
    )


if __name__ == "__main__":
    main()
