# SPDX-License-Identifier: Apache-2.0
"""How long one eager call of a layer on a GPU keeps the thread that calls, all experts resident.

The shape of Qwen3-30B's layers in bfloat16, one token. The call returns when its work is enqueued;
the GPU is idle again before each row of calls. `small_op` is one
elementwise operation of torch's: what this processor and Python take for the least there is.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from gpu_timing import ANY_SPREAD, gpu
from transformers import Qwen3MoeConfig, Qwen3MoeModel

import sida

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
CALLS = 20
"""In a row; sida keeps the routing of 32 calls, and would then wait for the GPU."""
OWN_LAYER_SECONDS, MODEL_LAYER_SECONDS = 25e-6, 40e-6


def own_layer(device: str) -> sida.OffloadedExperts:
    """Return a layer of one's own with all its experts resident."""
    make: dict[str, Any] = dict(device=device, dtype=torch.bfloat16)
    up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, **make) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, **make) * INTERMEDIATE**-0.5
    return sida.OffloadedExperts(up, down, gated=True, activation="silu", memory=1.0)


def offloaded_model(device: str) -> Any:
    """Return the handle of a decoder of two layers, all experts resident."""
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128,
    )
    with torch.device(device):
        model = Qwen3MoeModel._from_config(config, dtype=torch.bfloat16)
    model = model.eval().requires_grad_(False)
    return sida.offload(model, memory=1.0, device=device)


def seconds_a_call(call: Callable[[], object], calls: int = CALLS) -> float:
    """Return how long the calling thread is kept by one of several calls in a row."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = (time.perf_counter() - begin) / calls
    torch.cuda.synchronize()
    return seconds


def measure(repetitions: int) -> dict[str, Any]:
    """Time calls in turns."""
    torch.manual_seed(0)
    hidden = torch.randn(1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ids = torch.randperm(EXPERTS, device="cuda")[:TOP_K].view(1, TOP_K)
    weights = torch.rand(1, TOP_K, device="cuda")
    out = torch.empty_like(hidden)
    layer, handle = own_layer("cuda"), offloaded_model("cuda")
    experts = handle.model.layers[0].mlp.experts
    calls: dict[str, Callable[[], object]] = {
        "own_layer": lambda: layer(hidden, ids, weights),
        "own_layer_to_out": lambda: layer(hidden, ids, weights, out=out),
        "model_layer": lambda: experts(hidden, ids, weights),
        "small_op": lambda: hidden.mul(2.0),
    }
    with layer, handle:
        # From the first call with all of them on, every expert is resident.
        everything = torch.arange(EXPERTS, device="cuda").view(-1, TOP_K)
        rows = torch.randn(len(everything), HIDDEN, device="cuda", dtype=torch.bfloat16)
        for call in (layer, experts):
            call(rows, everything, torch.rand(everything.shape, device="cuda"))
        seconds = harness.interleave(
            {name: functools.partial(seconds_a_call, call) for name, call in calls.items()},
            repetitions,
        )
    return {
        "gpu": gpu(),
        "calls_in_a_row": CALLS,
        "seconds": seconds,
        "targets": [
            harness.target(
                "OffloadedExperts at T = 1, all resident, seconds of the calling thread",
                seconds["own_layer"]["median"],
                at_most=OWN_LAYER_SECONDS,
            ),
            harness.target(
                "an offloaded model's layer at T = 1, all resident, seconds of the calling thread",
                seconds["model_layer"]["median"],
                at_most=MODEL_LAYER_SECONDS,
            ),
        ],
    }


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    torch.set_grad_enabled(False)
    harness.run("cuda/layer_call", options, lambda: measure(options.repetitions), spread=ANY_SPREAD)


if __name__ == "__main__":
    main()
