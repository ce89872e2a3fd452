# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a trained decoder and the load of its experts, run by transformers alone."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from decoder import held_out_windows, load_decoder
from texts import KINDS


@torch.no_grad()
def evaluate(
    model: Any, texts: Mapping[str, tuple[Tensor, Tensor]], *, batch_size: int = 32
) -> dict[str, Any]:
    """Perplexity by kind of text and over all, and for each layer how its experts are used.

    Args:
        model: The decoder.
        texts: For each kind, windows of ids and the tokens that follow, both [N, window].
        batch_size: Windows in a pass.
    """
    device = next(model.parameters()).device
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
    losses = {}
    model.eval().set_experts_implementation("eager")  # grouped products may round
    for kind, (ids, following) in texts.items():
        total = 0.0
        batches = list(zip(*(torch.split(t, batch_size) for t in (ids, following)), strict=True))
        for rows, next_ in tqdm(batches, desc=f"evaluate {kind}"):
            found = model(input_ids=rows.to(device), output_router_logits=True, use_cache=False)
            loss = F.cross_entropy(
                found.logits.flatten(0, 1).float(), next_.flatten().to(device), reduction="sum"
            )
            total += float(loss)
            for layer, logits in enumerate(found.router_logits):
                chosen = logits.topk(config.num_experts_per_tok, -1).indices.flatten()
                counts[layer] += chosen.bincount(minlength=config.num_experts).cpu()
        losses[kind] = total
    tokens = {kind: ids.numel() for kind, (ids, _) in texts.items()}
    shares = counts / counts.sum(-1, keepdim=True)
    return {
        "tokens": tokens,
        "perplexity": {
            kind: round(math.exp(loss / max(1, tokens[kind])), 3) for kind, loss in losses.items()
        },
        "perplexity over all": round(
            math.exp(sum(losses.values()) / max(1, sum(tokens.values()))), 3
        ),
        "experts used": (counts > 0).sum(-1).tolist(),
        "largest share of uses": [round(share, 4) for share in shares.amax(-1).tolist()],
        "smallest share of uses": [round(share, 4) for share in shares.amin(-1).tolist()],
    }


def held_out(data: Path, window: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The held-out windows of each kind of text in a folder that prepare_texts.py wrote."""
    return {kind: held_out_windows(data / f"held_out-{kind}.npy", window) for kind in KINDS}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the trained decoder")
    parser.add_argument(
        "--data", type=Path, default=Path(".data/texts"), help="from prepare_texts.py"
    )
    parser.add_argument("--window", type=int, default=256, help="tokens that the model sees")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    model = load_decoder(options.model).to(options.device)
    print(json.dumps(evaluate(model, held_out(options.data, options.window)), indent=2))


if __name__ == "__main__":
    main()
