# SPDX-License-Identifier: Apache-2.0
"""What n-grams with Kneser-Ney smoothing reach on the same split: the bar for the model.

Writes the perplexity on the held-out texts for several orders; the model has to beat the best of
them. Interpolated, with one discount for each order (Chen & Goodman 1998, section 4.1.6).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoder import TEXTS, held_out_windows
from shared import write_json
from texts import KINDS

BITS = 12
"""Of a token in the code of an n-gram: five fit into 64 bits, the last token in the lowest."""

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """The n-grams of one order, and what follows each context of n - 1 tokens."""

    codes: Codes
    counts: Codes
    contexts: Codes
    totals: Codes
    followers: Codes
    discount: float

    @classmethod
    def of(cls, codes: Codes, counts: Codes) -> Order:
        """Collect n-grams, sorted and each once, by context."""
        contexts, begins, followers = np.unique(
            codes >> BITS, return_index=True, return_counts=True
        )
        once, twice = (int((counts == n).sum()) for n in (1, 2))
        return cls(
            codes,
            counts,
            contexts,
            totals=np.add.reduceat(counts, begins),
            followers=followers.astype(np.int64),
            discount=once / max(1, once + 2 * twice),
        )

    def interpolate(self, codes: Codes, lower: Floats) -> Floats:
        """Probabilities of the last tokens of n-grams, given those of the next lower order."""
        count = _look_up(self.codes, self.counts, codes)
        total = _look_up(self.contexts, self.totals, codes >> BITS)
        followers = _look_up(self.contexts, self.followers, codes >> BITS)
        kept = np.maximum(count - self.discount, 0) + self.discount * followers * lower
        return np.where(total > 0, kept / np.maximum(total, 1), lower)


class KneserNey:
    """An n-gram model of a row of tokens.

    Args:
        tokens: [N] ids below 2 ** `BITS`.
        order: Of the longest n-grams, five at most.
        vocab_size: How many ids there are.
    """

    def __init__(self, tokens: Codes, order: int, vocab_size: int) -> None:
        if not 1 <= order <= 63 // BITS or vocab_size > 1 << BITS:
            raise ValueError(
                f"expected an order of 1 to {63 // BITS} and {1 << BITS} ids at most, got order "
                f"{order} and {vocab_size} ids"
            )
        self.vocab_size = vocab_size
        codes, counts = np.unique(_codes(tokens, order)[order - 1 :], return_counts=True)
        self.orders = [Order.of(codes, counts)]
        for n in range(order - 1, 0, -1):  # lower orders count the tokens that come before
            codes, counts = np.unique(codes & ((1 << BITS * n) - 1), return_counts=True)
            self.orders.insert(0, Order.of(codes, counts))

    def probabilities(self, tokens: Codes) -> Floats:
        """Of each token [N] after those before it; the first ones come after ids of 0."""
        found = np.full(len(tokens), 1 / self.vocab_size)
        for n, order in enumerate(self.orders, 1):
            found = order.interpolate(_codes(tokens, n), found)
        return found


def _codes(tokens: Codes, order: int) -> Codes:
    """The n-gram that ends at each token [N]; before the first token come ids of 0."""
    padded = np.concatenate([np.zeros(order - 1, np.int64), tokens.astype(np.int64)])
    codes = np.zeros(len(tokens), np.int64)
    for place in range(order):
        codes = (codes << BITS) | padded[place : place + len(tokens)]
    return codes


def _look_up(keys: Codes, values: Codes, wanted: Codes) -> Codes:
    """Values of sorted keys, 0 for those that are not there."""
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def perplexities(model: KneserNey, data: Path, window: int) -> dict[str, float]:
    """By kind of text and over all, of the tokens that `measure_decoder` asks the decoder for."""
    logs = {}
    for kind in KINDS:
        ids, following = held_out_windows(data / f"held_out-{kind}.npy", window)
        tokens = np.concatenate([ids.numpy().ravel()[:1], following.numpy().ravel()])
        logs[kind] = np.log(model.probabilities(tokens)[1:])
    logs["over all"] = np.concatenate(list(logs.values()))
    return {kind: round(math.exp(-values.mean()), 3) for kind, values in logs.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=TEXTS, help="from prepare_texts.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("ngrams.json"))
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--window", type=int, default=256, help="as given to measure_decoder.py")
    options = parser.parse_args(arguments)

    started = time.perf_counter()
    texts = [np.load(options.data / f"train-{kind}.npy") for kind in KINDS]
    tokens = np.concatenate(texts).astype(np.int64)
    vocab_size = len(json.loads((options.data / "tokenizer.json").read_text())["model"]["vocab"])
    found = {
        str(order): perplexities(KneserNey(tokens, order, vocab_size), options.data, options.window)
        for order in options.orders
    }
    report: dict[str, Any] = {
        "model": "interpolated Kneser-Ney n-grams of the same tokens",
        "perplexity by order": found,
        "best perplexity over all": min(by_kind["over all"] for by_kind in found.values()),
        "training tokens": len(tokens),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"numpy": np.__version__},
    }
    write_json(options.out, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
