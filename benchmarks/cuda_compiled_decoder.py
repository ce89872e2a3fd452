# SPDX-License-Identifier: Apache-2.0
"""Decoders on a GPU whose step is compiled: a token at batch 1, with all and with fewer experts.

What `generate` does with a static cache: torch's kernels in CUDA graphs, and between them sida's
operators, which compute the experts. R, M, turns and what is random are those of cuda_decoder.py.
accelerate's hooks cannot be compiled; it runs as there.
"""

from __future__ import annotations

import copy
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
    bring_all,
    fewer,
    free_memory,
)
from decoder_models import SHAPES, SMALL, Shape, make_decoder, text
from gpu_timing import ANY_SPREAD, gpu, link_peak
from torch import Tensor

import sida

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
    full = sida.offload(copy.deepcopy(model), memory=1.0, device=device)
    with full:
        total, top_k = full.stats()["total_experts"], model.config.num_experts_per_tok
        bring_all(full, total // shape.layers, top_k)
        own = Compiled(full.model, tokens, length)
        eager = Decoding(full.model, tokens)
        result["resident"] = resident(own, eager, model, tokens, length, turns)
        look_ahead = sida.offload(copy.deepcopy(model), memory=0.25, device=device)
        free_memory()
        plain = sida.offload(model, memory=0.25, device=device, predictor=False)  # no peer is left
        free_memory()
        with look_ahead, plain:
            handles = {"resident": full, "no_prediction": plain, "look_ahead": look_ahead}
            ways = {who: Compiled(off.model, tokens, length) for who, off in handles.items()}
            for share in SHARES:
                for off in (look_ahead, plain):
                    off.resize(share)
                    off.model(input_ids=tokens[:, :LONG_PROMPT], use_cache=False)  # fills slots
                result[f"{share:.0%}"] = fewer(handles, ways, peak, rounds)
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


def measure(options: Any) -> dict[str, Any]:
    """Return the figures of the shapes that were asked for."""
    shapes = {}
    for name in options.shape:
        shape = SHAPES[name]
        if options.small:
            small = {key: value for key, value in SMALL.items() if key in shape.config}
            shape = Shape(shape.family, {**shape.config, **small})
        shapes[name] = measure_shape(name, shape, options)
        torch.compiler.reset()
    kept = [target for found in shapes.values() for target in found["targets"]]
    return {"gpu": gpu(), "shapes": shapes, "targets": kept}


def main() -> None:
    """Run the command line."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=["qwen3-30b"])
    parser.add_argument("--device", default="cuda", help="cpu only tries the benchmark itself")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the benchmark")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cuda.enable_cudnn_sdp(False)  # see cuda_decoder.py
    harness.run(NAME, options, lambda: measure(options), spread=ANY_SPREAD)


if __name__ == "__main__":
    main()
