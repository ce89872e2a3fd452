# SPDX-License-Identifier: Apache-2.0
"""Trains a predictor of the decoder's routing, and measures what it names beforehand.

Writes ``predictor.safetensors`` beside the model, and its figures on held-out text into
``predictor.json``. Needs sida.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import sida
from decoder import TEXTS, grouped_experts, held_out_windows, load_decoder, training_batch
from shared import provenance, write_json
from sida.huggingface.adapter import find_adapter
from sida.torch import MoeAdapter, Predictor, record_routing
from texts import KINDS


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


def named_beforehand(predictor: Predictor, adapter: MoeAdapter, windows: Tensor) -> list[float]:
    """For each layer, which part of the experts is among as many that the predictor names."""
    found = torch.zeros(len(adapter.layer_names))
    for ids in tqdm(torch.split(windows, 1), desc="measure"):
        record = record_routing(adapter, ids)
        named = predictor.predict(record.embeddings, record.mask, adapter.top_k).ids[:, 0]
        known = (record.experts[..., None] == named[..., None, :]).any(-1)
        found += known.float().mean((1, 2))
    return [round(float(part), 4) for part in found / len(windows)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder that train_decoder.py wrote")
    parser.add_argument("--data", type=Path, default=TEXTS, help="from prepare_texts.py")
    parser.add_argument("--kind", default="lstm", help="lstm or token")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16, help="windows in a step")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--windows", type=int, default=20, help="of each kind, to measure on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    model = load_decoder(options.model)
    texts = [np.load(options.data / f"train-{kind}.npy") for kind in KINDS]
    stream = torch.from_numpy(np.concatenate(texts).astype(np.int32))
    batches = Windows(stream, options.window, options.batch_size, options.seed)
    started = time.perf_counter()
    with grouped_experts(model):
        predictor = sida.train_predictor(
            model, batches, options.kind, steps=options.steps, seed=options.seed
        )
    seconds = time.perf_counter() - started
    predictor.save(options.model / "predictor.safetensors")
    figures: dict[str, Any] = {"kind": predictor.kind, "named": {}}
    for kind in KINDS:
        windows, _ = held_out_windows(options.data / f"held_out-{kind}.npy", options.window)
        every = max(1, len(windows) // options.windows)
        shown = windows[::every][: options.windows]
        figures["named"][kind] = named_beforehand(predictor, find_adapter(model), shown)
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
