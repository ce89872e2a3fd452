# SPDX-License-Identifier: Apache-2.0
"""`generate` of Switch-base's encoder-decoder on a GPU, a fifth of its experts there, and peers.

A call reads sentences with the skew of text and chooses tokens greedily, always the same number.
Candidates run in turns, in each on the same sentences. `M` is the bytes that were moved at the rate
of the link in this run. In bfloat16 a rounding may decide a token, and then all that come behind it
are others: how many are Hugging Face's is said, and nothing is held against it. See switch_base.py
for what is random.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Mapping
from typing import Any

import harness
import torch
from gpu_timing import ANY_SPREAD, finished, free_memory, gpu, link_peak
from switch_base import (
    BATCHES,
    SMALL,
    accelerated,
    batches_of,
    make_encoder_decoder,
    shape_name,
)
from torch import Tensor

import sida

SHAPES = ((1, 128), (8, 128))
SHARE = 0.2
REPETITIONS = 6
"""accelerate needs seconds for a call."""
TIMES_ACCELERATE = 8


class Generating:
    """A model that chooses tokens.

    Args:
        model: The model.
        new_tokens: How many, for each sentence.

    Attributes:
        tokens: What the last call chose, [sentences, new_tokens].
    """

    tokens: Tensor

    def __init__(self, model: Any, new_tokens: int) -> None:
        self._model, self._new_tokens = model, new_tokens

    def __call__(self, batch: Tensor) -> float:
        """Choose behind some sentences; the seconds of it."""
        return finished(lambda: self._choose(batch))

    def _choose(self, batch: Tensor) -> None:
        chosen = self._model.generate(
            batch,
            attention_mask=torch.ones_like(batch),  # the most frequent token has padding's id
            do_sample=False,
            min_new_tokens=self._new_tokens,
            max_new_tokens=self._new_tokens,
        )
        self.tokens = chosen[:, 1:]


def measure_shape(
    ways: Mapping[str, Generating],
    handles: Mapping[str, sida.Offloaded],
    batches: list[Tensor],
    turns: int,
    peak: float,
) -> dict[str, Any]:
    """Time calls of all ways in turns; those of `handles` are sida's.

    Returns seconds of a call, by way, and the share of tokens that are Hugging Face's; of sida's
    ways also what a call moved, and the seconds that the link needs for it.
    """
    for batch in batches:
        ways["resident"](batch)  # brings every expert that they need
    at = batches[0]
    same: dict[str, list[float]] = {name: [] for name in ways}

    def begin_turn(turn: int) -> None:
        nonlocal at
        at = batches[turn % BATCHES]
        if turn == 1:
            for off in handles.values():
                off.reset_stats()

    def call(name: str) -> float:
        seconds = ways[name](at)
        equal = ways[name].tokens == ways["hugging_face"].tokens
        same[name].append(equal.float().mean().item())
        return seconds

    candidates = {name: functools.partial(call, name) for name in ways}
    figures: dict[str, Any] = harness.interleave(candidates, turns, begin_turn)
    for name, found in figures.items():
        found["same_tokens"] = statistics.mean(same[name])
    for name, off in handles.items():
        stats = off.stats()
        moved = stats["bytes_moved"] / turns
        figures[name] |= {"bytes": moved, "moving": moved / peak, "hit_rate": stats["hit_rate"]}
        figures[name]["foretold"] = stats["look_ahead"]["hit_rate"]
    return figures


def targets(shapes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what was promised."""
    return [
        harness.target(
            f"{name}, {SHARE:.0%}, {what}, against accelerate, times as fast",
            figures["accelerate"]["median"] / figures[way]["median"],
            at_least=TIMES_ACCELERATE,
        )
        for name, figures in shapes.items()
        for way, what in (("no_prediction", "without prediction"), ("look_ahead", "look-ahead"))
    ]


def offloaded(model: Any, device: str, **options: Any) -> sida.Offloaded:
    """Return a handle of a copy."""
    off = sida.offload(copy.deepcopy(model), device=device, **options)
    free_memory()
    return off


def measure(options: Any) -> dict[str, Any]:
    """Return times of a call, by sentences x tokens."""
    device = options.device
    peak = link_peak(device)
    sizes: dict[str, Any] = SMALL if options.small else {}
    model = make_encoder_decoder(options.experts, device, **sizes)
    batches = {shape: batches_of(shape, device) for shape in SHAPES}
    peer = accelerated(model, SHARE, device)
    free_memory()
    handles = {
        "resident": offloaded(model, device, memory=1.0),
        "no_prediction": offloaded(model, device, memory=SHARE, predictor=False),
        "look_ahead": offloaded(model, device, memory=SHARE),
    }
    # The first is the one whose tokens all others' are compared with.
    models = {"hugging_face": model, "accelerate": peer}
    models |= {name: off.model for name, off in handles.items()}
    ways = {name: Generating(each, options.new_tokens) for name, each in models.items()}
    shapes = {
        shape_name(shape): measure_shape(ways, handles, each, options.repetitions, peak)
        for shape, each in batches.items()
    }
    for off in handles.values():
        off.close()
    return {
        "gpu": gpu(),
        "experts": options.experts,
        "share": SHARE,
        "new_tokens": options.new_tokens,
        "link_bytes_per_second": peak,
        "shapes": shapes,
        "targets": targets(shapes),
    }


def main() -> None:
    """Run the command line."""
    parser = harness.arguments(__doc__, REPETITIONS)
    parser.add_argument("--experts", type=int, default=128, help="of a layer (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=16, help="of a call (default: 16)")
    parser.add_argument("--device", default="cuda", help="cpu only tries the benchmark itself")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the benchmark")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    harness.run("cuda/generate", options, lambda: measure(options), spread=ANY_SPREAD)


if __name__ == "__main__":
    main()
