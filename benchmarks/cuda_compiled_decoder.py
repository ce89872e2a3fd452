# SPDX-License-Identifier: Apache-2.0
"""Decoders on a GPU whose step is compiled: a token at batch 1, with all and with fewer experts.

What `generate` does with a static cache: torch's kernels in CUDA graphs, and between them sida's
operators, which compute the experts. R, M, turns and what is random are those of cuda_decoder.py.
accelerate's hooks cannot be compiled; it runs as there.
"""

from __future__ import annotations

from typing import Any

import harness
import torch
from cuda_decoder import (
    LLAMA_CPP,
    LONG_PROMPT,
    PROMPT,
    ROUND,
    SHARES,
    TIMES_ACCELERATE,
    WARM,
    WARM_ROUNDS,
    Decoding,
    accelerated,
    all_resident,
    each_share,
    fewer,
    run,
    with_fewer,
)
from decoder_models import Shape, make_decoder, text
from gpu_timing import free_memory, link_peak
from torch import Tensor

NAME = "cuda/compiled_decoder"


class Compiled(Decoding):
    """A model that reads tokens one by one, each by the same compiled graph.

    Args:
        model: The model.
        tokens: [1, tokens], the prompt first; it is read as it is, not compiled.
        length: Of the cache, in tokens.
        experts: As for Decoding.
    """

    def __init__(self, model: Any, tokens: Tensor, length: int, experts: str | None = None) -> None:
        from transformers import StaticCache

        self._static = StaticCache(config=model.config, max_cache_len=length)
        self._graph: Any = torch.compile(
            model, mode="reduce-overhead", fullgraph=True, dynamic=False
        )
        super().__init__(model, tokens, experts)

    def begin(self) -> None:
        """Read the prompt, with nothing before it."""
        self._use()
        self._static.reset()
        self._at = PROMPT
        self._position = torch.full((1, 1), PROMPT, device=self._tokens.device)
        prompt = self._tokens[:, :PROMPT]
        self._model(input_ids=prompt, past_key_values=self._static, use_cache=True)

    def _read(self, ids: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        read = {"input_ids": ids, "position_ids": self._position}
        logits = self._graph(**read, past_key_values=self._static, use_cache=True).logits
        self._position = self._position + 1
        return logits


def resident(
    ours: Compiled, eager: Decoding, model: Any, tokens: Tensor, length: int, turns: int
) -> dict[str, Any]:
    """Time a token in the ways in which everything is resident."""
    ways = {"sida": ours, "sida_eager": eager} | {
        name: Compiled(model, tokens, length, name) for name in ("grouped_mm", "batched_mm")
    }
    early = [(name, [way.token() for _ in range(WARM)]) for name, way in ways.items()]
    print("tokens that are not counted, seconds:", early, flush=True)
    return harness.interleave({name: way.token for name, way in ways.items()}, turns)


def measure_shape(name: str, shape: Shape, options: Any) -> dict[str, Any]:
    """Return the figures of one shape."""
    torch.compiler.reset()
    free_memory()  # of the shape before
    device, turns = options.device, options.repetitions
    rounds = max(4, turns // 2)
    length = PROMPT + max(WARM + turns + 1, (WARM_ROUNDS + rounds) * ROUND)
    peak, tokens = link_peak(device), text(8 * LONG_PROMPT, device)
    model = make_decoder(shape, device)
    result: dict[str, Any] = {
        "layers": shape.layers,
        "link_bytes_per_second": peak,
        "accelerate": accelerated(model, tokens, device)["token"],
    }
    free_memory()
    with all_resident(model, device) as full:
        own = Compiled(full.model, tokens, length)
        eager = Decoding(full.model, tokens)
        result["resident"] = resident(own, eager, model, tokens, length, turns)
        with with_fewer(full, model, device) as handles:
            ways = {"resident": own} | {
                who: Compiled(handles[who].model, tokens, length)
                for who in ("no_prediction", "look_ahead")
            }
            for share in each_share(handles, tokens):
                result[share] = fewer(handles, ways, peak, rounds)
    result["targets"] = targets(name, result)
    return result


def targets(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures of a shape against what was promised."""
    kept = []

    def hold(what: str, figure: float, **limit: float) -> None:
        kept.append(harness.target(f"{name}, compiled, {what}", figure, **limit))

    for share in SHARES:
        for way, what in (("no_prediction", "without prediction"), ("look_ahead", "look-ahead")):
            over = found[f"{share:.0%}"][way]["over_bound"]
            hold(f"a token, {share:.0%}, {what}, time / (R + M)", over, at_most=1.10)
    half = found["50%"]
    fastest = min(half[way]["median"] for way in ("no_prediction", "look_ahead"))
    if name in TIMES_ACCELERATE:
        times = found["accelerate"]["median"] / fastest
        hold("a token, 50 %, against accelerate", times, at_least=TIMES_ACCELERATE[name])
    if name == "qwen3-30b":
        what = "50 %, tokens a second of 48 layers (extrapolated), llama.cpp's being 29.8"
        hold(what, found["layers"] / (48 * fastest), at_least=LLAMA_CPP)
    times = {who: figures["median"] for who, figures in found["resident"].items()}
    peer = min(("grouped_mm", "batched_mm"), key=lambda who: times[who])
    hold(f"a token, 100 %, against {peer} compiled", times[peer] / times["sida"], at_least=1.0)
    return kept


if __name__ == "__main__":
    run(NAME, __doc__, measure_shape, ["qwen3-30b"])
