# SPDX-License-Identifier: Apache-2.0
"""Trains the Switch classifier on the glosses that prepare.py wrote.

The same command on a GPU and on a CPU. Checkpoints are written every so many steps; the same
command again goes on from the last one. On a CPU a resumed run gives the very same weights.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, SwitchTransformersEncoderModel

from classifier import Classifier, make_config, save_classifier
from evaluate import evaluate
from glosses import LABELS, encode, read_jsonl, training_batches
from grouped_experts import group_experts, hugging_face_state, record_logits, routing_losses
from recipe import (
    learning_rate,
    load_checkpoint,
    provenance,
    round_weights,
    save_atomically,
    write_json,
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".data/wordnet"), help="from prepare.py")
    parser.add_argument("--out", type=Path, default=Path(".data/wordnet-switch-32"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak; 100 steps warm-up, cosine")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--token-dropout", type=float, default=0.15, help="tokens shown as [MASK]")
    parser.add_argument("--label-smoothing", type=float, default=0.05)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of load balancing")
    parser.add_argument("--z-loss", type=float, default=1e-3)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--d-ff", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8, help="every second one holds experts")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="checkpoint there and leave")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace, vocab_size: int) -> Classifier:
    """A fresh classifier, a function of the seed."""
    torch.manual_seed(options.seed)
    config = make_config(
        d_model=options.d_model,
        d_ff=options.d_ff,
        layers=options.layers,
        experts=options.experts,
        heads=options.heads,
        dropout=options.dropout,
        vocab_size=vocab_size,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    encoder = SwitchTransformersEncoderModel(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("router.classifier.weight"):
            # transformers' own start (deviation 1) routes with near certainty from the first step
            # on; even odds let load balancing act.
            nn.init.normal_(parameter, std=0.5 * options.d_model**-0.5)
    return Classifier(encoder, nn.Linear(options.d_model, len(LABELS)), options.dropout)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed run must share with the run that it goes on from."""
    free = {"data", "out", "device", "checkpoint_every", "stop_at"}
    return {k: v for k, v in vars(options).items() if k not in free}


def train(options: argparse.Namespace) -> None:
    """Trains, or goes on training; then writes the model and its metrics."""
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.data)
    texts = encode(tokenizer, read_jsonl(options.data / "train.jsonl"))
    classifier = build(options, len(tokenizer))
    config = classifier.encoder.config
    group_experts(classifier.encoder, options.dropout)
    router_logits = record_logits(classifier.encoder)
    classifier.to(device).train()
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True
    )

    first, seconds = 0, 0.0
    checkpoint = options.out / "checkpoint.pt"
    if saved := load_checkpoint(checkpoint, settings(options), device):
        classifier.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]

    last = min(options.steps, options.stop_at or options.steps)
    batches = training_batches(texts.lengths, options.batch_size, options.seed, first)
    started = time.perf_counter()

    def save(step: int) -> None:
        save_atomically(
            checkpoint,
            {
                "step": step,
                "seconds": seconds + time.perf_counter() - started,
                "settings": settings(options),
                "model": classifier.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )

    progress = tqdm(
        range(first, last), initial=first, total=options.steps, desc="train", mininterval=2
    )
    for step in progress:
        # Every step draws from its own stream, so a resumed run draws what an unbroken one does.
        torch.manual_seed((options.seed << 32) + step + 1)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * learning_rate(step, options.steps)
        ids, mask, labels = (t.to(device, non_blocking=True) for t in texts.batch(next(batches)))
        hidden = (torch.rand(ids.shape, device=device) < options.token_dropout) & mask.bool()
        logits: Tensor = classifier(ids.masked_fill(hidden, tokenizer.mask_token_id), mask)
        balance, z = routing_losses(router_logits, mask)
        loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
        total = loss + options.balance * balance + options.z_loss * z
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", balance=f"{balance.item():.2f}")
        if (step + 1) % options.checkpoint_every == 0 and step + 1 < last:
            save(step + 1)
    save(last)
    if last < options.steps:
        return

    torch.backends.cuda.matmul.allow_tf32 = False
    encoder = SwitchTransformersEncoderModel(config)
    encoder.load_state_dict(hugging_face_state(classifier.encoder.state_dict()))
    trained = Classifier(encoder, classifier.head).to(device)
    round_weights(trained.encoder)
    seconds += time.perf_counter() - started
    metrics = {
        "held_out": evaluate(
            trained, encode(tokenizer, read_jsonl(options.data / "held_out.jsonl"))
        ),
        "training texts": len(texts.labels),
        "seconds": round(seconds, 1),
        "settings": settings(options),
        **provenance(device),
    }
    save_classifier(trained, options.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(options.data / name, options.out / name)
    write_json(options.out / "metrics.json", metrics)
    print(metrics["held_out"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    train(parse(arguments))


if __name__ == "__main__":
    main()
