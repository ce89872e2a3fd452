# SPDX-License-Identifier: Apache-2.0
"""Decoders on a GPU: a token at batch 1, and a prompt, with all and with fewer experts there.

`R` is the time of a handle with all experts resident, measured in the same turns as what is held
against it, for the host's clock varies from minute to minute; `M` the bytes that were moved at the
rate of the link in this run. Peers run on the same weights in the same process, token by token in
turns; every one has a cache of its own and reads the same tokens. Attention is torch's flash kernel
for all. See decoder_models.py for what is random.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from decoder_models import SHAPES, Shape, cut_down, half_on_host, make_decoder, text
from gpu_timing import ANY_SPREAD, finished, free_memory, gpu, link_peak, wait
from torch import Tensor

import sida
from sida.torch.experts_module import ExpertsModule

NAME = "cuda/decoder"
MeasureShape = Callable[[str, Shape, Any], dict[str, Any]]
SHARES = (0.75, 0.5, 0.25)
PROMPT, LONG_PROMPT = 32, 512
WARM = 24
"""Tokens that every candidate reads before those that count."""
ROUND = 8
"""Tokens whose times are added: with few experts they differ much from one to the next."""
WARM_ROUNDS = 4
"""Rounds before those that count: by then the prompt's experts have made way for the tokens'."""
BATCHED_BYTES = 40 << 30
"""batched_mm copies every token's experts: prompts for which that is more are left out."""
TIMES_ACCELERATE = {"qwen3-30b": 40, "mixtral": 15}
"""At 50 %, against accelerate with half of the layers' experts on the host."""
LLAMA_CPP = 29.8
"""Tokens a second with half of the layers' experts on the CPU, Qwen3-30B's shape, 48 layers, on an
H200 with 16 cores (llama.cpp 0c1e57098): not measured in the same run."""
LAYER_SECONDS = 40e-6
"""What sida may add to a layer's call on the calling thread."""


class Decoding:
    """A model that reads tokens one by one behind a prompt.

    Args:
        model: The model.
        tokens: [1, tokens], the prompt first.
        experts: The implementation of transformers' that computes its experts, where it does.
    """

    def __init__(self, model: Any, tokens: Tensor, experts: str | None = None) -> None:
        self._model, self._tokens, self._experts = model, tokens, experts
        self.begin()

    def begin(self) -> None:
        """Read the prompt, with nothing before it."""
        from transformers import DynamicCache

        self._use()
        self._cache, self._at = DynamicCache(), PROMPT
        self._read(self._tokens[:, :PROMPT])

    def token(self) -> float:
        """Read the next token; its seconds."""
        self._use()
        token = self._tokens[:, self._at : self._at + 1]
        self._at += 1
        return finished(lambda: self._read(token))

    def prompt(self, ids: Tensor) -> float:
        """Read another prompt by itself; its seconds."""
        self._use()
        return finished(lambda: self._model(input_ids=ids, use_cache=False))

    def _use(self) -> None:
        if self._experts:
            self._model.set_experts_implementation(self._experts)

    def _read(self, ids: Tensor) -> Any:
        return self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)


def skew(off: sida.Offloaded, ids: Tensor) -> float:
    """Return the share of a layer's uses that its most used tenth of experts has."""
    off.reset_stats()
    off.model(input_ids=ids, use_cache=False)
    with tempfile.TemporaryDirectory() as folder:
        table = off.record(Path(folder) / "table")
    shares, experts = [], off.stats()["total_experts"] // table.layers
    for layer in table.ids:
        uses = np.sort(np.bincount(layer.ravel(), minlength=experts))[::-1]
        shares.append(float(uses[: max(1, len(uses) // 10)].sum() / uses.sum()))
    return statistics.mean(shares)


def resident(
    ours: Any, model: Any, tokens: Tensor, turns: int, batched_bytes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time a token and a prompt in the ways in which everything is resident."""
    ways = {"sida": Decoding(ours, tokens)} | {
        name: Decoding(model, tokens, name) for name in ("eager", "grouped_mm", "batched_mm")
    }
    early = [way.token() for way in ways.values() for _ in range(WARM)]
    print("tokens that are not counted, ms:", [round(1e3 * took, 1) for took in early], flush=True)
    decode = harness.interleave({name: way.token for name, way in ways.items()}, turns)
    if batched_bytes > BATCHED_BYTES:
        del ways["batched_mm"]
    prompt = tokens[:, :LONG_PROMPT]
    timed = {name: functools.partial(way.prompt, prompt) for name, way in ways.items()}
    return decode, harness.interleave(timed, max(5, turns // 4))


def fewer(
    handles: Mapping[str, sida.Offloaded], ways: Mapping[str, Decoding], peak: float, rounds: int
) -> dict[str, Any]:
    """Time tokens of all handles in turns, the one named `resident` being what bounds the others.

    `ways`, by the handles' names, read tokens of their models, here from the prompt on.

    Returns seconds of a token, by handle; of those that move experts also the seconds that the link
    needs for them, and how many times as long as its bound a token takes, by medians of the rounds.
    """
    for way in ways.values():
        way.begin()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    moving: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARM_ROUNDS + rounds):
        for name, way in ways.items():
            if turn == WARM_ROUNDS:
                handles[name].reset_stats()
            before = handles[name].stats()["bytes_moved"]
            took = sum(way.token() for _ in range(ROUND))
            if turn >= WARM_ROUNDS:
                moved = handles[name].stats()["bytes_moved"] - before
                seconds[name].append(took / ROUND)
                moving[name].append(moved / ROUND / peak)
    figures: dict[str, Any] = {name: harness.summary(times) for name, times in seconds.items()}
    for name in ways:
        if name == "resident":
            continue
        found, stats = figures[name], handles[name].stats()
        found["moving"] = statistics.median(moving[name])
        bound = figures["resident"]["median"] + found["moving"]
        found["over_bound"] = found["median"] / bound
        found |= {"hit_rate": stats["hit_rate"], "foretold": stats["look_ahead"]["hit_rate"]}
    return figures


def prompts(
    full: sida.Offloaded, off: sida.Offloaded, tokens: Tensor, peak: float, turns: int
) -> dict[str, Any]:
    """Time a long prompt, each time another, with all experts resident and with fewer, in turns."""
    resident, way = Decoding(full.model, tokens), Decoding(off.model, tokens)
    own, seconds, moving, first = [], [], [], []
    for turn in range(turns + 1):
        begin = turn * LONG_PROMPT % (tokens.shape[1] - LONG_PROMPT)
        ids = tokens[:, begin : begin + LONG_PROMPT]
        took_resident = resident.prompt(ids)
        off.reset_stats()
        took = way.prompt(ids)
        stats = off.stats()
        if turn:
            own.append(took_resident)
            seconds.append(took)
            moving.append(stats["bytes_moved"] / peak)
            first.append(stats["layers"][0]["misses"] * stats["slot_bytes"] / peak)
    found = {"moving": statistics.median(moving), "first_layer": statistics.median(first)}
    bound = max(statistics.median(own), found["moving"]) + found["first_layer"]
    return {
        **harness.summary(seconds),
        **found,
        "resident": harness.summary(own),
        "over_bound": statistics.median(seconds) / bound,
    }


def accelerated(model: Any, tokens: Tensor, device: str) -> dict[str, Any]:
    """Time a token and a prompt with every second layer's experts on the host."""
    model.set_experts_implementation("grouped_mm")
    way = Decoding(half_on_host(model, device), tokens)
    prompt = tokens[:, :LONG_PROMPT]
    return {
        "token": harness.summary([way.token() for _ in range(5)][1:]),
        "prompt": harness.summary([way.prompt(prompt) for _ in range(3)][1:]),
    }


class Blocks:
    """The MoE blocks of a model, and their experts alone, on inputs like a token's."""

    def __init__(self, model: Any, hidden_size: int, device: str, experts: str | None) -> None:
        self._model, self._experts = model, experts
        self._blocks = [layer.mlp for layer in model.model.layers]
        torch.manual_seed(1)
        make: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self._inputs = [torch.randn(1, 1, hidden_size, **make) for _ in self._blocks]
        self._routed = []
        for block, hidden in zip(self._blocks, self._inputs, strict=True):
            _, weights, ids = block.gate(hidden.view(1, -1))
            self._routed.append((hidden.view(1, -1), ids, weights))

    def use(self) -> None:
        """Let this way compute what follows."""
        if self._experts:
            self._model.set_experts_implementation(self._experts)

    def blocks(self) -> None:
        """Run every layer's router and experts."""
        for block, hidden in zip(self._blocks, self._inputs, strict=True):
            block(hidden)

    def experts(self) -> None:
        """Run every layer's experts."""
        for block, routed in zip(self._blocks, self._routed, strict=True):
            block.experts(*routed)


def blocks_alone(ways: dict[str, Blocks], layers: int, turns: int) -> dict[str, dict[str, Any]]:
    """Time blocks and experts alone: on the calling thread, and to the end."""
    found: dict[str, dict[str, Any]] = {}
    for part in ("blocks", "experts"):
        runs = {name: getattr(way, part) for name, way in ways.items()}

        def thread(name: str, runs: dict[str, Any] = runs) -> float:
            ways[name].use()
            wait()
            begin = time.perf_counter()
            runs[name]()
            return (time.perf_counter() - begin) / layers

        def eager(name: str, runs: dict[str, Any] = runs) -> float:
            ways[name].use()
            return finished(runs[name]) / layers

        for what, timed in (("thread", thread), ("eager", eager)):
            candidates = {name: functools.partial(timed, name) for name in ways}
            found[f"{part}_{what}"] = harness.interleave(candidates, turns)
    return found


def bring_all(off: sida.Offloaded) -> None:
    """Call every layer with choices that name each expert, so that all are resident."""
    model: Any = off.model
    embedding = model.get_input_embeddings().weight
    for experts in model.modules():
        if isinstance(experts, ExpertsModule):
            ids = torch.arange(experts.num_experts, device=embedding.device)[:, None]
            hidden = embedding.new_zeros(len(ids), embedding.shape[1])
            experts(hidden, ids, torch.ones(ids.shape, device=embedding.device))
    stats = off.stats()
    if stats["resident_experts"] < stats["total_experts"]:
        raise RuntimeError(f"expected all experts to be resident, got\n{stats}")


def all_resident(model: Any, device: str) -> sida.Offloaded:
    """Return a handle of a copy, with all experts resident."""
    off = sida.offload(copy.deepcopy(model), memory=1.0, device=device)
    free_memory()
    bring_all(off)
    return off


@contextmanager
def with_fewer(
    full: sida.Offloaded, model: Any, device: str
) -> Iterator[dict[str, sida.Offloaded]]:
    """Yield the handles that `fewer` times; `model` itself is taken, so that no peer is left."""
    look_ahead = sida.offload(copy.deepcopy(model), memory=0.25, device=device)
    free_memory()
    plain = sida.offload(model, memory=0.25, device=device, predictor=False)
    free_memory()
    with look_ahead, plain:
        yield {"resident": full, "no_prediction": plain, "look_ahead": look_ahead}


def each_share(handles: Mapping[str, sida.Offloaded], tokens: Tensor) -> Iterator[str]:
    """Yield the name of each share, when the handles of fewer have it and their slots are full."""
    for share in SHARES:
        for name in ("look_ahead", "no_prediction"):
            handles[name].resize(share)
            handles[name].model(input_ids=tokens[:, :LONG_PROMPT], use_cache=False)
        yield f"{share:.0%}"


def measure_shape(name: str, shape: Shape, options: Any) -> dict[str, Any]:
    """Return the figures of one shape."""
    free_memory()  # of the shape before
    device, turns = options.device, options.repetitions
    peak = link_peak(device)
    tokens = text(8 * LONG_PROMPT, device)
    model = make_decoder(shape, device)
    result: dict[str, Any] = {
        "layers": shape.layers,
        "link_bytes_per_second": peak,
        "accelerate": accelerated(model, tokens, device),
    }
    free_memory()
    with all_resident(model, device) as full:
        top_k, slot = model.config.num_experts_per_tok, full.stats()["slot_bytes"]
        result["most_used_tenth"] = skew(full, tokens[:, :2048])
        result["expert_bytes"], result["top_k"] = slot, top_k
        result["resident"], result["prompt_resident"] = resident(
            full.model, model, tokens, turns, LONG_PROMPT * top_k * slot
        )
        hidden_size = model.config.hidden_size
        blocks = {"sida": Blocks(full.model, hidden_size, device, None)} | {
            peer: Blocks(model, hidden_size, device, peer) for peer in ("grouped_mm", "batched_mm")
        }
        result["alone"] = blocks_alone(blocks, shape.layers, turns)
        del blocks
        with with_fewer(full, model, device) as handles:
            rounds = max(4, turns // 2)
            unread = tokens[:, LONG_PROMPT:]
            ways = {who: Decoding(off.model, unread) for who, off in handles.items()}
            for share in each_share(handles, tokens):
                few = fewer(handles, ways, peak, rounds)
                few["prompt"] = prompts(full, handles["look_ahead"], tokens, peak, rounds)
                result[share] = few
    result["targets"] = targets(name, result)
    return result


def targets(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures of a shape against what was promised."""
    kept = []

    def hold(what: str, figure: float, **limit: float) -> None:
        kept.append(harness.target(f"{name}, {what}", figure, **limit))

    for share in SHARES:
        few = found[f"{share:.0%}"]
        place = f"a token, {share:.0%}"
        for way, what in (("no_prediction", "without prediction"), ("look_ahead", "look-ahead")):
            hold(f"{place}, {what}, time / (R + M)", few[way]["over_bound"], at_most=1.10)
        over = few["prompt"]["over_bound"]
        hold(
            f"a prompt, {share:.0%}, time / (max(R, M) + first layer's misses)", over, at_most=1.15
        )
    half = found["50%"]
    if name in TIMES_ACCELERATE:
        times = found["accelerate"]["token"]["median"] / half["no_prediction"]["median"]
        limit = TIMES_ACCELERATE[name]
        hold("a token, 50 %, against accelerate, times as fast", times, at_least=limit)
    if name == "qwen3-30b":
        fastest = min(half[way]["median"] for way in ("no_prediction", "look_ahead"))
        rate_of_48 = found["layers"] / (48 * fastest)
        what = "50 %, tokens a second of 48 layers (extrapolated), llama.cpp's being 29.8"
        hold(what, rate_of_48, at_least=LLAMA_CPP)
    for what, key in (("a token", "resident"), ("a prompt", "prompt_resident")):
        times = {who: figures["median"] for who, figures in found[key].items()}
        peers = {who: times[who] for who in ("grouped_mm", "batched_mm") if who in times}
        peer = min(peers, key=lambda who: peers[who])
        against = f"{what}, 100 %, against {peer}, times as fast"
        hold(against, peers[peer] / times["sida"], at_least=1.0)
    alone = found["alone"]
    times = {who: figures["median"] for who, figures in alone["blocks_eager"].items()}
    fastest = min(value for who, value in times.items() if who != "sida")
    hold("MoE block alone, times as fast", fastest / times["sida"], at_least=1.2)
    thread = alone["experts_thread"]["sida"]["median"]
    hold("calling thread, a layer's experts, µs", 1e6 * thread, at_most=1e6 * LAYER_SECONDS)
    return kept


def measure(
    name: str, options: Any, measure_shape: MeasureShape, among: Mapping[str, Shape]
) -> dict[str, Any]:
    """Return the figures of the shapes that were asked for, beside those recorded before."""
    recorded = harness.RESULTS / f"{name}.json"
    before = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
    shapes: dict[str, Any] = dict(before.get("shapes", {}))
    for shape_name in options.shape:
        shape = cut_down(among[shape_name]) if options.small else among[shape_name]
        origin = harness.provenance()
        shapes[shape_name] = {key: origin[key] for key in ("commit", "command", "date")}
        shapes[shape_name]["device"] = gpu().get("name")
        shapes[shape_name] |= measure_shape(shape_name, shape, options)
    return {"gpu": gpu(), "shapes": shapes, "targets": all_targets(shapes)}


def all_targets(shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of all shapes."""
    return [target for found in shapes.values() for target in found["targets"]]


def run(
    name: str,
    description: str | None,
    measure_shape: MeasureShape,
    default: list[str],
    among: Mapping[str, Shape] = SHAPES,
) -> None:
    """Run the command line of a benchmark that measures shapes one by one.

    Args:
        name: Of the benchmark, see `harness.run`.
        description: What it says of itself.
        measure_shape: Returns the figures of a shape, by its name, itself and the options.
        default: Shapes that are measured where none are named.
        among: The shapes that there are, by name.
    """
    parser = harness.arguments(description)
    parser.add_argument("--shape", nargs="*", choices=list(among), help="these alone")
    parser.add_argument("--device", default="cuda", help="cpu only tries the benchmark itself")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the benchmark")
    options = parser.parse_args()
    options.shape = options.shape or default
    torch.set_grad_enabled(False)
    # cuDNN's attention, torch's first choice on Hopper, makes a plan for each new length, 3 ms a
    # layer: whoever reads a length first would pay for all who read it later.
    torch.backends.cuda.enable_cudnn_sdp(False)
    harness.run(
        name, options, lambda: measure(name, options, measure_shape, among), spread=ANY_SPREAD
    )


if __name__ == "__main__":
    run(NAME, __doc__, measure_shape, list(SHAPES))
