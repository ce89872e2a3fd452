# SPDX-License-Identifier: Apache-2.0
"""One MoE layer of Switch-base's shape, all resident: sida, Hugging Face's eager layer, the bound.

The bound is the longer of two times measured in the same run: the active experts' weights at the
rate at which memory is read, and the layer's operations at torch's rate of a large matrix product.
Both sides have weights of their own, so that neither finds in a cache what the other has read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
SHARE_OF_BOUND = {"f32": 0.7, "bf16": 0.6}
CLOSE_TO_BOUND = 0.85
TOLERANCE = {"f32": 1e-4, "bf16": 2e-2}


def ceilings(dtype: torch.dtype, repetitions: int) -> dict[str, float]:
    """Bytes a second read from memory, and operations a second of a 2048 x 3072 x 768 product.

    The bytes are those of whichever of torch's operations reads 1 GiB fastest.
    """
    memory = torch.ones(1 << 28)
    rows, vector = memory.view(-1, 4096), torch.ones(4096)
    x = torch.randn(2048, HIDDEN).to(dtype)
    weight = torch.randn(INTERMEDIATE, HIDDEN).to(dtype)
    readers: dict[str, Callable[[], object]] = {
        "sum": memory.sum,
        "dot": lambda: memory.dot(memory),
        "matrix times vector": lambda: torch.mv(rows, vector),
    }
    times = harness.interleave(
        {**readers, "product": lambda: torch.nn.functional.linear(x, weight)}, repetitions
    )
    return {
        "read_bytes_per_second": memory.nbytes / min(times[name]["minimum"] for name in readers),
        "flops_per_second": 2 * x.shape[0] * weight.numel() / times["product"]["minimum"],
    }


def experts_of_hugging_face(experts: int, dtype: torch.dtype) -> SwitchTransformersExperts:
    """Random experts."""
    config = SwitchTransformersConfig(
        d_model=HIDDEN, d_ff=INTERMEDIATE, num_experts=experts, dropout_rate=0.0
    )
    return SwitchTransformersExperts(config).to(dtype).eval().requires_grad_(False)


def stacked(theirs: SwitchTransformersExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the same weights as [E, I, H] and [E, H, I]."""
    modules = list(theirs.values())
    return (
        torch.stack([module.wi.weight for module in modules]),
        torch.stack([module.wo.weight for module in modules]),
    )


class Routing:
    """The experts of each token, new in each turn."""

    def __init__(self, experts: int, tokens: int) -> None:
        """Route `tokens` tokens to `experts` experts."""
        self._experts, self._tokens = experts, tokens
        self._order = torch.randperm(experts)
        self.active: list[int] = []

    def prepare(self, turn: int) -> None:
        """Draw at random; a single token takes an expert that no turn took of late."""
        if self._tokens == 1:
            self.ids = self._order[turn % self._experts].view(1, 1)
        else:
            self.ids = torch.randint(self._experts, (self._tokens, 1))
        self.one_hot = torch.nn.functional.one_hot(self.ids, self._experts)
        self.active.append(len(set(self.ids.flatten().tolist())))


def measure(
    theirs: SwitchTransformersExperts,
    ours: sida.OffloadedExperts,
    dtype: torch.dtype,
    tokens: int,
    repetitions: int,
    limits: dict[str, float],
) -> dict[str, Any]:
    """Time one number of tokens."""
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    weights = torch.rand(tokens, 1).to(dtype)
    routing = Routing(len(theirs), tokens)

    def run_ours() -> Any:
        return ours(hidden, routing.ids, weights)

    def run_theirs() -> Any:
        return theirs(hidden, routing.one_hot, weights)

    routing.prepare(0)
    expected = run_theirs().float()
    error = ((run_ours().float() - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE[NAMES[dtype]]:
        raise RuntimeError(f"the layers disagree: expected equal outputs, got an error of {error}")
    routing.active.clear()
    times = harness.interleave(
        {"sida": run_ours, "eager": run_theirs},
        repetitions * (10 if tokens == 1 else 1),
        prepare=routing.prepare,
    )
    active = sum(routing.active[1:]) / len(routing.active[1:])
    bytes_read = active * 2 * HIDDEN * INTERMEDIATE * dtype.itemsize
    flops = 4 * tokens * HIDDEN * INTERMEDIATE
    bound = max(bytes_read / limits["read_bytes_per_second"], flops / limits["flops_per_second"])
    return {
        "dtype": NAMES[dtype],
        "tokens": tokens,
        "active_experts": active,
        "bound_seconds": bound,
        **{f"{name}_seconds": value for name, value in times.items()},
        "share_of_bound": bound / times["sida"]["median"],
        "times_faster_than_eager": times["eager"]["median"] / times["sida"]["median"],
    }


def targets(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of one row."""
    what = f"{row['dtype']}, {row['tokens']} tokens"
    share, ratio = row["share_of_bound"], row["times_faster_than_eager"]
    bound = harness.target(
        f"{what}: share of the bound", share, at_least=SHARE_OF_BOUND[row["dtype"]]
    )
    if row["dtype"] == "f32" and share >= CLOSE_TO_BOUND:
        return [bound]
    at_least = 1.8 if row["dtype"] == "bf16" and row["tokens"] == 1024 else 1.5
    return [bound, harness.target(f"{what}: times as fast as eager", ratio, at_least=at_least)]


@torch.no_grad()
def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Time every dtype and number of tokens."""
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        limits = ceilings(dtype, options.repetitions)
        print(
            f"{NAMES[dtype]}: reads {limits['read_bytes_per_second'] / 1e9:.1f} GB/s, "
            f"multiplies {limits['flops_per_second'] / 1e9:.0f} GFLOP/s"
        )
        theirs = experts_of_hugging_face(options.experts, dtype)
        up, down = stacked(theirs)
        with sida.OffloadedExperts(up, down, gated=False, activation="relu", memory=1.0) as ours:
            for tokens in options.tokens:
                row = measure(theirs, ours, dtype, tokens, options.repetitions, limits)
                rows.append({**row, **limits})
                print(
                    f"  {tokens:5} tokens: {row['sida_seconds']['median'] * 1e3:8.2f} ms (minimum "
                    f"{row['sida_seconds']['minimum'] * 1e3:.2f}), {row['share_of_bound']:.0%} of "
                    f"the bound, {row['times_faster_than_eager']:.2f} times as fast as eager"
                )
    kept = [target for row in rows for target in targets(row)]
    return {"experts": options.experts, "targets": kept, "rows": rows}


def main() -> None:
    """Run the command line."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024])
    options = parser.parse_args()
    harness.run("expert_layer", options, lambda: compare(options))


if __name__ == "__main__":
    main()
