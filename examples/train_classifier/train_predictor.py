# SPDX-License-Identifier: Apache-2.0
"""Trains and measures sida's predictors for a trained classifier.

For each kind asked for, writes ``predictor-KIND.safetensors`` beside the model, and its figures on
held-out text into ``predictor-KIND.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from classifier import Classifier, load_classifier
from glosses import Encoded, encode, epoch_batches, read_jsonl
from grouped_experts import grouped_experts
from recipe import provenance, write_json
from sida.huggingface.adapter import find_adapter
from sida.torch import Predictor, train_predictor


@dataclass
class ShuffledBatches:
    """Batches of a text set, in a new order every time they are gone through."""

    texts: Encoded
    batch_size: int
    seed: int
    epoch: int = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = epoch_batches(self.texts.lengths, self.batch_size, self.seed, self.epoch)
        self.epoch += 1
        for index in order:
            ids, mask, _ = self.texts.batch(index)
            yield {"input_ids": ids, "attention_mask": mask}


def sorted_batches(texts: Encoded, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All texts once, those of about one length together, with their labels."""
    for index in torch.split(texts.lengths.argsort(stable=True), batch_size):
        ids, mask, labels = texts.batch(index)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def accuracies(classifier: Classifier, predictor: Predictor, texts: Encoded) -> tuple[float, float]:
    """The classifier's accuracy with its own routing, and routed by the predictor alone."""
    adapter = find_adapter(classifier.encoder)
    device = next(classifier.parameters()).device
    exact = routed = 0
    for batch in tqdm(list(sorted_batches(texts, 256)), desc="accuracy"):
        ids, mask, labels = (t.to(device) for t in batch.values())
        exact += int((classifier(ids, mask).argmax(-1) == labels).sum())
        named = predictor.predict(adapter.embed(ids), mask, 1)
        tables = {
            layer: (named.ids[head].flatten(0, 1), named.scale[head].flatten(0, 1))
            for head, layer in enumerate(predictor.heads)
        }
        with adapter.forced_routing(tables):
            routed += int((classifier(ids, mask).argmax(-1) == labels).sum())
    return exact / len(texts.labels), routed / len(texts.labels)


def measure(classifier: Classifier, predictor: Predictor, texts: Encoded) -> dict[str, Any]:
    """Figures of one predictor on texts that it was not trained on."""
    device = next(classifier.parameters()).device
    evaluation = predictor.evaluate(
        classifier.encoder,
        sorted_batches(texts, 256),
        lambda _encoder, batch: classifier(
            batch["input_ids"].to(device), batch["attention_mask"].to(device)
        ),
    )
    exact, routed = accuracies(classifier, predictor, texts)
    figures = {
        name: [round(x, 4) for x in value]
        for name, value in evaluation.items()
        if isinstance(value, list) and isinstance(value[0], float)
    }
    return {
        "accuracy": exact,
        "accuracy with predicted routing": routed,
        "accuracy kept": routed / exact if exact else None,
        "predictions kept": evaluation["fidelity"],
        **figures,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder that train.py wrote")
    parser.add_argument("--data", type=Path, default=Path(".data/wordnet"), help="from prepare.py")
    parser.add_argument("--kind", nargs="+", default=["transformer", "lstm"])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train = encode(tokenizer, read_jsonl(options.data / "train.jsonl"))
    held_out = encode(tokenizer, read_jsonl(options.data / "held_out.jsonl"))
    classifier = load_classifier(options.model).to(options.device)
    for kind in options.kind:
        started = time.perf_counter()
        # Several times faster. On a GPU the grouped experts round to bfloat16, which moves a few
        # close decisions of the routers; the figures below are of the model as it is.
        with grouped_experts(classifier.encoder):
            predictor = train_predictor(
                classifier.encoder,
                ShuffledBatches(train, options.batch_size, options.seed),
                kind,
                steps=options.steps,
                seed=options.seed,
            )
        seconds = time.perf_counter() - started
        predictor.save(options.model / f"predictor-{kind}.safetensors")
        figures = {
            "kind": kind,
            **measure(classifier, predictor, held_out),
            "parameters": sum(p.numel() for p in predictor.network.parameters()),
            "steps": options.steps,
            "batch size": options.batch_size,
            "seed": options.seed,
            "seconds": round(seconds, 1),
            **provenance(torch.device(options.device)),
        }
        write_json(options.model / f"predictor-{kind}.json", figures)
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
