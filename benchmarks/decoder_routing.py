# SPDX-License-Identifier: Apache-2.0
"""Hit rates of a trained decoder: caches alone, look-ahead, a trained predictor, and bounds.

The committed decoder takes one token a pass, as generation does: excerpts of held-out text
("reading"), and what it writes itself after their first tokens ("writing"). Look-ahead runs; caches
alone and tables are replayed from the routing of such a run. Tables stand one token ahead, which
can be while reading alone: what is written is known when the token before is done.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache, OlmoeForCausalLM

import sida
from sida.cli.replay import Recording, load_recording
from sida.torch import Predictor

MODEL = harness.ROOT / "models" / "texts-olmoe-32"
SHARES = (10, 25, 50, 75)
"""Percent of the experts that fit."""
POLICIES = ("fifo", "lru", "lfu", "auto")
TOKENS, PROMPT = 48, 12
"""Of each excerpt, and of its beginning after which the model writes itself."""
TEMPERATURE = 0.8
LINK, LAYER_SECONDS = 1e9, 1e-3
"""Of replays with tables, since over an infinite link every expert would arrive at once."""
PREDICTOR = MODEL / "predictor.safetensors"
WAYS = {"look-ahead": None, "predictor": PREDICTOR}
"""Predictors of the runs."""


@dataclass(frozen=True)
class Task:
    """What the decoder does: excerpts [N, at most `TOKENS`], of which `given` tokens are read."""

    name: str
    rows: list[Tensor]
    given: int

    def run(self, model: Any) -> list[list[int]]:
        """Go through all excerpts, one token a pass; return the tokens that went in."""
        return [list(self._decode(model, row)) for row in self.rows]

    def _decode(self, model: Any, row: Tensor) -> Iterator[int]:
        draw = torch.Generator().manual_seed(0)
        cache = DynamicCache(config=model.config)
        token = int(row[0])
        for place in range(TOKENS):
            yield token
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
            if place + 1 < self.given:
                token = int(row[place + 1])
            else:
                odds = (logits[0, -1].float() / TEMPERATURE).softmax(-1)
                token = int(torch.multinomial(odds, 1, generator=draw))


def load_tasks() -> list[Task]:
    """Reading and writing, on the same excerpts."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = (MODEL / "excerpts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [tokenizer.eos_token + json.loads(line)["text"] for line in lines]
    rows = [torch.tensor(tokenizer(text)["input_ids"][:TOKENS]) for text in texts]
    return [Task("reading", rows, TOKENS), Task("writing", rows, PROMPT)]


def shares(counts: Mapping[str, Any]) -> dict[str, float]:
    """Hits and late uses in parts of all, and experts moved a pass."""
    uses = counts["uses"]
    return {
        "hits": round(counts["hits"] / uses, 4),
        "late": round(counts["late"] / uses, 4),
        "loads": round(counts["loads"] / counts["passes"], 2),
    }


def offload_and_run(
    model: Any, task: Task, share: int, predictor: Any
) -> tuple[Mapping[str, Any], Recording, list[list[int]]]:
    """Statistics, routing and tokens of a run."""
    with (
        tempfile.TemporaryDirectory() as folder,
        sida.offload(model, memory=share / 100, predictor=predictor) as off,
    ):
        tokens = task.run(off.model)
        path = Path(folder) / "routing.safetensors"
        off.record(path)
        return off.stats(), load_recording(path), tokens


@torch.no_grad()
def named_by(
    predictor: Predictor, model: Any, tokens: list[list[int]], count: int
) -> NDArray[np.int64]:
    """The experts [layers, tokens, count] that a predictor names, text by text."""
    embed = model.get_input_embeddings()
    rows = [torch.tensor(row)[None] for row in tokens]
    named = [predictor.predict(embed(ids), torch.ones_like(ids), count).ids[:, 0] for ids in rows]
    return torch.cat(named, 1).numpy()


def replay(
    recording: Recording, share: int, policy: str, foretold: sida.HashTable | None
) -> dict[str, Any]:
    """What `sida.replay` says of a cache alone, or with tables one token ahead; with `loads`."""
    found = sida.replay(
        recording.routing,
        foretold,
        experts=recording.experts,
        expert_bytes=recording.expert_bytes,
        memory=share / 100,
        policy=policy,
        ahead=0 if foretold is None else 1,
        bytes_per_second=None if foretold is None else LINK,
        layer_seconds=LAYER_SECONDS,
    )
    found["loads"] = found["bytes_moved"] / recording.expert_bytes
    return found


def alone(recording: Recording, share: int) -> dict[str, dict[str, float]]:
    """Caches alone, by policy, and the least that any of them must load."""
    found = {policy: replay(recording, share, policy, None) for policy in POLICIES}
    uses, passes = found["auto"]["uses"], found["auto"]["passes"]
    least = found["auto"]["belady_bytes"] / recording.expert_bytes
    belady = {"uses": uses, "passes": passes, "hits": uses - least, "late": 0, "loads": least}
    return {name: shares(counts) for name, counts in {**found, "belady": belady}.items()}


def named_beforehand(
    routing: sida.HashTable, named: NDArray[np.int64], stats: Mapping[str, Any]
) -> dict[str, list[float | None]]:
    """For each layer, which part of a token's experts is named beforehand, and by what.

    Args:
        routing: Of a run.
        named: [layers, tokens, experts] by the predictor, as many as a token uses.
        stats: Of the same run with look-ahead.
    """
    ids = np.asarray(routing.ids)

    def part(used: NDArray[Any], guesses: NDArray[Any]) -> list[float | None]:
        known = (used[..., None] == guesses[:, :, None, :]).any(-1)
        return [round(float(share), 4) for share in known.mean((1, 2))]

    return {
        "token before": part(ids[:, 1:], ids[:, :-1]),
        "look-ahead": [layer["look_ahead"]["hit_rate"] for layer in stats["layers"]],
        "predictor": part(ids, named),
    }


@torch.no_grad()
def perplexities(model: Any, predictor: Any, rows: list[Tensor]) -> dict[str, float]:
    """Perplexity of texts with the model's own routing, and with routing from the predictor."""
    found = {}
    for routing in ("exact", "predicted"):
        losses: list[Tensor] = []
        with sida.offload(model, memory=1.0, routing=routing, predictor=predictor) as off:
            for row in rows:
                logits = off.model(input_ids=row[None]).logits[0, :-1].float()
                losses.append(F.cross_entropy(logits, row[1:], reduction="none"))
        found[routing] = round(float(torch.cat(losses).mean().exp()), 3)
    return found


def measure() -> dict[str, Any]:
    """Return hit rates of every task, budget and way."""
    torch.set_num_threads(1)  # products as small as these are faster so
    model = OlmoeForCausalLM.from_pretrained(MODEL).eval()
    predictor = sida.load_predictor(PREDICTOR)
    found: dict[str, Any] = {}
    for task in load_tasks():
        _, recording, expected = offload_and_run(model, task, SHARES[-1], False)
        routing = recording.routing
        rates: dict[str, Any] = {}
        for share in SHARES:
            rates[str(share)] = alone(recording, share)
            for way, made_by in WAYS.items():
                stats, _, tokens = offload_and_run(model, task, share, made_by)
                if tokens != expected:
                    raise AssertionError(f"{task.name}, {way}: other tokens at {share} %")
                rates[str(share)][way] = shares(stats)
                if way == "look-ahead":
                    ahead = stats
            if task.given == TOKENS:
                tables = shares(replay(recording, share, "auto", routing))
                rates[str(share)]["recorded"] = tables
            print(task.name, share, rates[str(share)], flush=True)
        named = named_by(predictor, model, expected, routing.candidates)
        found[task.name] = {"rates": rates, "layers": named_beforehand(routing, named, ahead)}
    return {
        "model": MODEL.name,
        "predictor": predictor.kind,
        "experts": recording.experts * recording.routing.layers,
        "excerpts": len(load_tasks()[0].rows),
        "tokens": TOKENS,
        "prompt": PROMPT,
        "temperature": TEMPERATURE,
        "perplexity": perplexities(model, PREDICTOR, load_tasks()[0].rows),
        "tasks": found,
    }


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    harness.run("decoder_routing", options, measure, timed=False)


if __name__ == "__main__":
    main()
