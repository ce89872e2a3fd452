# SPDX-License-Identifier: Apache-2.0
"""A decoder of every family on a GPU, all experts resident: sida beside transformers' own.

A token at batch 1, a prompt of 512 tokens, and the MoE blocks alone on one token, by sida and by
each implementation that transformers has for experts, in turns on the same weights. See
decoder_models.py for the shapes and for what is random.
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import torch
from cuda_decoder import LONG_PROMPT, all_resident, resident, run
from decoder_models import FAMILIES, Shape, make_decoder, text
from gpu_timing import finished, free_memory

NAME = "cuda/families"
PEERS = ("eager", "grouped_mm", "batched_mm")


def blocks_of(model: Any) -> list[Any]:
    """Return the modules that hold router and experts, layer by layer."""
    return [module for module in model.modules() if hasattr(module, "experts")]


def blocks_alone(ours: Any, model: Any, turns: int) -> dict[str, Any]:
    """Time the MoE blocks of all layers on one token, to their end; seconds of a layer."""
    torch.manual_seed(1)
    weight = model.get_input_embeddings().weight
    hidden = torch.randn(1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype)

    def timed(owner: Any, experts: str | None) -> float:
        if experts:
            owner.set_experts_implementation(experts)
        blocks = blocks_of(owner)
        return finished(lambda: [block(hidden) for block in blocks]) / len(blocks)

    ways = {"sida": functools.partial(timed, ours, None)}
    ways |= {peer: functools.partial(timed, model, peer) for peer in PEERS}
    return harness.interleave(ways, turns)


def measure_family(name: str, shape: Shape, options: Any) -> dict[str, Any]:
    """Return the figures of one family."""
    free_memory()  # of the family before
    device, turns = options.device, options.repetitions
    tokens = text(2 * LONG_PROMPT, device)
    model = make_decoder(shape, device)
    with all_resident(model, device) as full:
        slot, choices = full.stats()["slot_bytes"], model.config.num_experts_per_tok
        decode, prompt = resident(full.model, model, tokens, turns, LONG_PROMPT * choices * slot)
        alone = blocks_alone(full.model, model, turns)
    result = {
        "layers": shape.layers,
        "expert_bytes": slot,
        "resident": decode,
        "prompt_resident": prompt,
        "block": alone,
    }
    return {**result, "targets": targets(name, result)}


def targets(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold a family's figures against what was promised."""
    kept = []
    for what, key, least in (
        ("a token", "resident", 1.0),
        ("a prompt of 512", "prompt_resident", 1.0),
        ("MoE block alone, a token", "block", 1.2),
    ):
        times = {way: figures["median"] for way, figures in found[key].items()}
        peer = min(times.keys() - {"sida"}, key=lambda way: times[way])
        figure = times[peer] / times["sida"]
        label = f"{name}, {what}, against {peer}, times as fast"
        kept.append(harness.target(label, figure, at_least=least))
    return kept


if __name__ == "__main__":
    run(NAME, __doc__, measure_family, list(FAMILIES), FAMILIES)
