# SPDX-License-Identifier: Apache-2.0
"""Trains the decoder on the texts that prepare_texts.py wrote.

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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, OlmoeForCausalLM

from decoder import grouped_experts, make_config, training_batch
from measure_decoder import evaluate, held_out
from shared import (
    learning_rate,
    load_checkpoint,
    provenance,
    round_weights,
    routing_losses,
    save_atomically,
    save_in_half,
    write_json,
)
from texts import KINDS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path(".data/texts"), help="from prepare_texts.py"
    )
    parser.add_argument("--out", type=Path, default=Path(".data/texts-olmoe-32"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128, help="windows in a step")
    parser.add_argument("--window", type=int, default=256, help="tokens that the model sees")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak; 100 steps warm-up, cosine")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--token-dropout", type=float, default=0.1, help="tokens shown as [MASK]")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of load balancing")
    parser.add_argument("--z-loss", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--intermediate-size", type=int, default=64, help="of one expert")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="checkpoint there and leave")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace, vocab_size: int) -> OlmoeForCausalLM:
    """A fresh decoder, a function of the seed."""
    torch.manual_seed(options.seed)
    return OlmoeForCausalLM(
        make_config(
            vocab_size=vocab_size,
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size,
            layers=options.layers,
            heads=options.heads,
            experts=options.experts,
            top_k=options.top_k,
            window=options.window,
        )
    )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed run must share with the run that it goes on from."""
    free = {"data", "out", "device", "checkpoint_every", "stop_at"}
    return {k: v for k, v in vars(options).items() if k not in free}


def losses(
    model: nn.Module, ids: Tensor, following: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the tokens that follow, load balancing, and router z loss."""
    on_gpu = ids.device.type == "cuda"
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=on_gpu):
        found = model(input_ids=ids, output_router_logits=True, use_cache=False)
    loss = F.cross_entropy(found.logits.flatten(0, 1).float(), following.flatten())
    balance, z = routing_losses(found.router_logits, torch.ones_like(ids), top_k=top_k)
    return loss, balance, z


def train(options: argparse.Namespace) -> None:
    """Trains, or goes on training; then writes the model and its metrics."""
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.data)
    texts = [np.load(options.data / f"train-{kind}.npy") for kind in KINDS]
    stream = torch.from_numpy(np.concatenate(texts).astype(np.int32))
    model = build(options, len(tokenizer)).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=(0.9, 0.95),
        weight_decay=options.weight_decay,
        fused=True,
    )

    first, seconds = 0, 0.0
    checkpoint = options.out / "checkpoint.pt"
    if saved := load_checkpoint(checkpoint, settings(options), device):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]

    last = min(options.steps, options.stop_at or options.steps)
    started = time.perf_counter()

    def save(step: int) -> None:
        save_atomically(
            checkpoint,
            {
                "step": step,
                "seconds": seconds + time.perf_counter() - started,
                "settings": settings(options),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )

    progress = tqdm(
        range(first, last), initial=first, total=options.steps, desc="train", mininterval=2
    )
    with grouped_experts(model):
        for step in progress:
            # Every step draws from its own stream, so a resumed run draws what an unbroken one
            # does.
            torch.manual_seed((options.seed << 32) + step + 1)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * learning_rate(step, options.steps)
            ids, following = (
                t.to(device, non_blocking=True)
                for t in training_batch(
                    stream, options.window, options.batch_size, options.seed, step
                )
            )
            hidden = torch.rand(ids.shape, device=device) < options.token_dropout
            loss, balance, z = losses(
                model, ids.masked_fill(hidden, tokenizer.mask_token_id), following, options.top_k
            )
            total = loss + options.balance * balance + options.z_loss * z
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 100 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}", balance=f"{balance.item():.2f}")
            if (step + 1) % options.checkpoint_every == 0 and step + 1 < last:
                save(step + 1)
    save(last)
    if last < options.steps:
        return

    round_weights(model)
    seconds += time.perf_counter() - started
    metrics = {
        "held_out": evaluate(model, held_out(options.data, options.window)),
        "training tokens": len(stream),
        "seconds": round(seconds, 1),
        "settings": settings(options),
        **provenance(device),
    }
    save_in_half(model, options.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "excerpts.jsonl"):
        shutil.copyfile(options.data / name, options.out / name)
    write_json(options.out / "metrics.json", metrics)
    print(metrics["held_out"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    train(parse(arguments))


if __name__ == "__main__":
    main()
