# SPDX-License-Identifier: Apache-2.0
"""A decoder of OLMoE's shape from disk, 25 % of its experts in memory, one token after the other.

A prompt and some tokens behind it, batch of one, with the page cache warm and with it dropped
before each call, outside its time. Weights and tokens are random, so that all experts are used
alike: the hardest case for a cache.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import checkpoints
import encoder
import harness
import torch
from accelerate import disk_offload
from torch import Tensor
from transformers import DynamicCache, OlmoeForCausalLM

import sida

LAYERS = 2
MEMORY = 0.25
PROMPT, TOKENS = 32, 2


def accelerate_decoder(folder: Path, offloaded: Path) -> Any:
    """Return the model with its experts on disk, brought layer by layer by accelerate's hooks."""
    model = OlmoeForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            disk_offload(module, str(offloaded / name), execution_device=torch.device("cpu"))
    checkpoints.sync(offloaded)
    gc.collect()
    return model


def run(model: Any, tokens: Tensor, before: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of a prompt, and of a token behind it; tokens [1, PROMPT + TOKENS]."""
    cache = DynamicCache(config=model.config)
    seconds = []
    for part in torch.split(tokens, [PROMPT, *[1] * TOKENS], dim=1):
        before()
        seconds.append(
            encoder.timed(functools.partial(model, part, past_key_values=cache, use_cache=True))
        )
    return seconds[0], sum(seconds[1:]) / TOKENS


def measure(repetitions: int) -> dict[str, Any]:
    """Return times of a prompt and of a token."""
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 50000, (repetitions + 1, 1, PROMPT + TOKENS), generator=draw)
    with checkpoints.olmoe(LAYERS) as folder, TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        theirs = accelerate_decoder(folder, scratch)
        ours = sida.from_pretrained(folder, memory=MEMORY, predictor=False)
        ours.model.eval()

        def drop() -> None:
            checkpoints.drop_page_cache(folder)
            checkpoints.drop_page_cache(scratch)

        found: dict[str, Any] = {}
        for cache, before in (("warm", lambda: None), ("cold", drop)):
            found[cache] = _in_turns({"none": ours.model, "accelerate": theirs}, texts, before)
        stats = ours.stats()
        ours.close()
    return {
        "layers": LAYERS,
        "memory": MEMORY,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "bytes_moved": stats["bytes_moved"] / stats["passes"],
        "seconds": found,
        "targets": [
            harness.target(
                f"a decoder from disk, page cache {cache}, times as fast as accelerate",
                found[cache]["accelerate"]["token"]["median"]
                / found[cache]["none"]["token"]["median"],
                at_least=at_least,
            )
            for cache, at_least in (("warm", 3), ("cold", 1.5))
        ],
    }


def _in_turns(
    models: dict[str, Any], texts: Tensor, before: Callable[[], None]
) -> dict[str, dict[str, dict[str, float]]]:
    """Time models in turns, the first turn not counted; by model, of a prompt and of a token."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for tokens in texts:
        for name, model in models.items():
            times[name].append(run(model, tokens, before))
    return {
        name: {
            what: harness.summary([pair[at] for pair in pairs[1:]])
            for at, what in enumerate(("prompt", "token"))
        }
        for name, pairs in times.items()
    }


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    # A virtual disk's own rate varies, and accelerate's time with what the allocator keeps.
    harness.run("decoder_disk", options, lambda: measure(options.repetitions), spread=3)


if __name__ == "__main__":
    main()
