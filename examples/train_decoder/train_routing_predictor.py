# SPDX-License-Identifier: Apache-2.0
"""Trains a predictor of the decoder's routing, and measures what it names beforehand.

Writes ``predictor.safetensors`` beside the model, and its figures on held-out text into
``predictor.json``. Needs sida.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from decoder import TEXTS, grouped_experts, held_out_windows, load_decoder, training_batch
from shared import provenance, write_json
from sida.torch import Candidates, Predictor, fit_predictor, record_routing
from texts import KINDS


class Teacher:
    """What sida asks of a model to train a predictor for it, answered for an OLMoE."""

    causal = True
    """A token is foretold from those before it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        layers = model.model.layers
        self.layer_names = [f"model.layers.{i}.mlp" for i in range(len(layers))]
        self.predictable = list(range(len(layers)))
        self.num_experts: int = model.config.num_experts
        self.top_k: int = model.config.num_experts_per_tok

    def stack(self) -> nn.Module:
        """The decoder below its output layer."""
        module: nn.Module = self._model.model
        return module

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings."""
        embeddings: Tensor = self._model.get_input_embeddings()(input_ids)
        return embeddings

    def routers(self) -> list[nn.Module]:
        """The router of each layer."""
        return [layer.mlp.gate for layer in self._model.model.layers]

    def routing(self, layer: int, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, experts and weights."""
        logits, weights, experts = output
        return logits.float(), experts, weights

    def forced_routing(
        self, tables: Mapping[int, tuple[Tensor, Tensor]]
    ) -> AbstractContextManager[None]:
        """Not needed: the predictor brings experts early, the routers decide."""
        raise NotImplementedError("this recipe's predictor does not route")

    def fingerprint(self) -> str:
        """A hash of embeddings and routers."""
        digest = hashlib.sha256()
        for module in (self._model.get_input_embeddings(), *self.routers()):
            for parameter in module.parameters():
                rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous()
                digest.update(rounded.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Windows:
    """Endless batches of training text."""

    stream: Tensor
    window: int
    batch_size: int
    seed: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = 0
        while True:
            ids, _ = training_batch(self.stream, self.window, self.batch_size, self.seed, step)
            yield {"input_ids": ids}
            step += 1


@torch.no_grad()
def foretell(
    predictor: Predictor, embed: Callable[[Tensor], Tensor], ids: Tensor, candidates: int
) -> Candidates:
    """What a predictor names for each token [S] when it has seen no token behind it.

    Returns:
        As `Predictor.predict` does, [heads, S, candidates].
    """
    count = len(ids)
    # Every beginning of the text as a row of its own, of which the last token counts.
    mask = torch.ones(count, count).tril().bool()
    rows = ids.expand(count, count).masked_fill(~mask, 0)
    named = predictor.predict(embed(rows), mask, candidates)
    last = torch.arange(count)
    return Candidates(*(values[:, last, last] for values in named))


def recall(predictor: Predictor, teacher: Teacher, windows: Tensor) -> list[float]:
    """For each layer, which part of the experts is among as many that the predictor names."""
    found = torch.zeros(len(teacher.layer_names))
    for ids in tqdm(windows, desc="measure"):
        used = record_routing(teacher, ids[None]).experts
        named = foretell(predictor, teacher.embed, ids, teacher.top_k).ids
        found += (used[..., None] == named[..., None, :]).any(-1).float().mean((1, 2))
    return [round(float(part), 4) for part in found / len(windows)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder that train_decoder.py wrote")
    parser.add_argument("--data", type=Path, default=TEXTS, help="from prepare_texts.py")
    parser.add_argument("--kind", default="token", help="token, lstm or transformer")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16, help="windows in a step")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--windows", type=int, default=20, help="of each kind, to measure on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    teacher = Teacher(model := load_decoder(options.model))
    texts = [np.load(options.data / f"train-{kind}.npy") for kind in KINDS]
    stream = torch.from_numpy(np.concatenate(texts).astype(np.int32))
    batches = Windows(stream, options.window, options.batch_size, options.seed)
    started = time.perf_counter()
    with grouped_experts(model):
        predictor = fit_predictor(
            teacher, batches, options.kind, steps=options.steps, seed=options.seed
        )
    seconds = time.perf_counter() - started
    predictor.save(options.model / "predictor.safetensors")
    figures: dict[str, Any] = {"kind": options.kind, "named": {}}
    for kind in KINDS:
        windows, _ = held_out_windows(options.data / f"held_out-{kind}.npy", options.window)
        every = max(1, len(windows) // options.windows)
        shown = windows[::every][: options.windows]
        figures["named"][kind] = recall(predictor, teacher, shown)
    figures |= {
        "parameters": sum(p.numel() for p in predictor.network.parameters()),
        "steps": options.steps,
        "batch size": options.batch_size,
        "window": options.window,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        **provenance(torch.device("cpu")),
    }
    write_json(options.model / "predictor.json", figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
