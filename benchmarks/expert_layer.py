# SPDX-License-Identifier: Apache-2.0
"""One MoE layer of Switch-base's shape, all resident: sida, Hugging Face's eager layer, the bound.

The bound is the longer of two times measured in the same run: the active experts' weights at the
rate at which memory is read, and the layer's operations at torch's rate of a large matrix product.
"""

from __future__ import annotations

import argparse
from typing import Any

import harness
import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

import sida

HIDDEN, INTERMEDIATE = 768, 3072
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second read from memory, and operations a second of a 2048 x 3072 x 768 product."""
    memory = torch.ones(1 << 28)
    x = torch.randn(2048, HIDDEN).to(dtype)
    weight = torch.randn(INTERMEDIATE, HIDDEN).to(dtype)
    times = harness.interleave(
        {"read": memory.sum, "product": lambda: torch.nn.functional.linear(x, weight)}
    )
    return {
        "read_bytes_per_second": memory.nbytes / times["read"]["minimum"],
        "flops_per_second": 2 * x.shape[0] * weight.numel() / times["product"]["minimum"],
    }


def experts_of_hugging_face(experts: int, dtype: torch.dtype) -> SwitchTransformersExperts:
    """Random experts."""
    config = SwitchTransformersConfig(
        d_model=HIDDEN, d_ff=INTERMEDIATE, num_experts=experts, dropout_rate=0.0
    )
    return SwitchTransformersExperts(config).to(dtype).eval().requires_grad_(False)


def stacked(theirs: SwitchTransformersExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """The same weights as [E, I, H] and [E, H, I]."""
    modules = list(theirs.values())
    return (
        torch.stack([module.wi.weight for module in modules]),
        torch.stack([module.wo.weight for module in modules]),
    )


def measure(
    experts: int, dtype: torch.dtype, tokens: int, limits: dict[str, float]
) -> dict[str, Any]:
    """Time one number of tokens, with new routing in each turn."""
    theirs = experts_of_hugging_face(experts, dtype)
    up, down = stacked(theirs)
    ours = sida.OffloadedExperts(up, down, gated=False, activation="relu", memory=1.0)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    weights = torch.rand(tokens, 1).to(dtype)
    routing: dict[str, torch.Tensor] = {}

    def prepare(repetition: int) -> None:
        torch.manual_seed(repetition)
        routing["ids"] = torch.randint(experts, (tokens, 1))
        one_hot = torch.nn.functional.one_hot(routing["ids"], experts)
        routing["one_hot"] = one_hot

    active: list[int] = []

    def run_ours() -> None:
        active.append(len(routing["ids"].unique()))
        ours(hidden, routing["ids"], weights)

    with torch.no_grad():
        times = harness.interleave(
            {"sida": run_ours, "eager": lambda: theirs(hidden, routing["one_hot"], weights)},
            prepare=prepare,
        )
    ours.close()
    mean_active = sum(active[1:]) / len(active[1:])
    bytes_read = mean_active * 2 * HIDDEN * INTERMEDIATE * up.element_size()
    flops = 4 * tokens * HIDDEN * INTERMEDIATE
    bound = max(bytes_read / limits["read_bytes_per_second"], flops / limits["flops_per_second"])
    return {
        "dtype": NAMES[dtype],
        "tokens": tokens,
        "active_experts": mean_active,
        "bound_seconds": bound,
        **{f"{name}_seconds": value for name, value in times.items()},
        "share_of_bound": bound / times["sida"]["median"],
        "times_faster_than_eager": times["eager"]["median"] / times["sida"]["median"],
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument(
        "--anyway", action="store_true", help="on a busy machine too; prints, writes nothing"
    )
    options = parser.parse_args()
    if not options.anyway:
        harness.wait_until_quiet()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        limits = ceilings(dtype)
        print(
            f"{NAMES[dtype]}: reads {limits['read_bytes_per_second'] / 1e9:.1f} GB/s, "
            f"multiplies {limits['flops_per_second'] / 1e9:.0f} GFLOP/s"
        )
        for tokens in options.tokens:
            row = {**measure(options.experts, dtype, tokens, limits), **limits}
            rows.append(row)
            print(
                f"  {tokens:5} tokens: {row['sida_seconds']['median'] * 1e3:8.2f} ms, "
                f"{row['share_of_bound']:.0%} of the bound, "
                f"{row['times_faster_than_eager']:.2f} times as fast as eager"
            )
    if not options.anyway:
        print(harness.write("expert_layer", {"experts": options.experts, "rows": rows}))


if __name__ == "__main__":
    main()
