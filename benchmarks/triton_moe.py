# SPDX-License-Identifier: Apache-2.0
"""The Triton peer of cuda_expert_layer.py: vLLM's fused MoE kernel in its chain of five steps.

The kernel is the source that fetch_triton_moe.py brings; the steps around it (rows padded to tiles,
activation, sum over choices) are written here, each one launch. Imports need a GPU.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "build" / "triton_moe"))
from fused_moe_kernel import fused_moe_kernel

# fmt: off
# (rows, outputs, depth, group, warps, stages) of a tile, by rows of an expert on average: those of
# vLLM's own tables for this GPU and their neighbours.
TILES: dict[int, list[tuple[int, ...]]] = {
    2: [(16, 64, 128, 1, 4, 4), (16, 32, 256, 1, 4, 4), (16, 128, 128, 1, 4, 3),
        (16, 64, 64, 1, 4, 5)],
    20: [(16, 64, 128, 1, 4, 4), (16, 128, 128, 1, 4, 3), (16, 128, 64, 1, 4, 5),
         (32, 128, 128, 1, 8, 3)],
    100: [(32, 128, 64, 1, 4, 4), (64, 128, 64, 1, 4, 4), (64, 256, 64, 1, 8, 3),
          (128, 128, 64, 1, 8, 4)],
    200: [(64, 128, 64, 16, 4, 4), (64, 256, 64, 16, 8, 4), (128, 128, 64, 16, 8, 4),
          (128, 256, 64, 16, 8, 3)],
    1 << 30: [(128, 128, 64, 16, 8, 4), (128, 256, 64, 16, 8, 3), (128, 256, 64, 32, 8, 4)],
}
# fmt: on


def options_for(rows: float) -> list[tuple[int, ...]]:
    """The tiles worth a try for `rows` rows of an expert on average."""
    return next(tiles for most, tiles in TILES.items() if rows <= most)


# A kernel's parameters are Triton's, which have no types in Python.
@triton.jit  # type: ignore[untyped-decorator]
def _pad_rows(  # type: ignore[no-untyped-def]
    active,
    active_count,
    order,
    rows,
    experts,
    padded,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program an active expert: its rows into whole tiles, the tiles into `experts`."""
    index = tl.program_id(0)
    total = tl.load(active_count)
    every = tl.arange(0, E)
    tiles = (tl.load(active + 4 * every + 2, mask=every < total, other=0) + BLOCK - 1) // BLOCK
    first = tl.sum(tl.where(every < index, tiles, 0))
    if index == 0:
        tl.store(padded, tl.sum(tiles) * BLOCK)
    if index < total:
        expert = tl.load(active + 4 * index)
        begin = tl.load(active + 4 * index + 1)
        count = tl.load(active + 4 * index + 2)
        lane = tl.arange(0, BLOCK)
        for tile in range((count + BLOCK - 1) // BLOCK):
            row = tile * BLOCK + lane
            value = tl.load(order + begin + row, mask=row < count, other=SIZE)
            tl.store(rows + (first + tile) * BLOCK + lane, value)
            tl.store(experts + first + tile, expert)


@triton.jit  # type: ignore[untyped-decorator]
def _activate(  # type: ignore[no-untyped-def]
    source, to, width, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    if GATED:
        gate = tl.load(source + row * 2 * width + column, mask=mask).to(tl.float32)
        up = tl.load(source + row * 2 * width + width + column, mask=mask).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up
    else:
        value = tl.maximum(tl.load(source + row * width + column, mask=mask).to(tl.float32), 0.0)
    tl.store(to + row * width + column, value.to(to.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_choices(  # type: ignore[no-untyped-def]
    source, to, H, K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        total += tl.load(source + (token * K + j) * H + column, mask=mask).to(tl.float32)
    tl.store(to + token * H + column, total.to(to.dtype.element_ty), mask=mask)


class TritonLayer:
    """One layer; `plan` enqueues the grouping of rows and gives active experts, count and order."""

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        gated: bool,
        plan: Callable[[], tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        self.up, self.down, self.hidden, self.ids, self.weights = up, down, hidden, ids, weights
        self.gated, self.plan = gated, plan
        self.tokens, self.top_k = ids.shape
        self.experts, self.intermediate = up.shape[0], down.shape[2]
        count = self.tokens * self.top_k
        make: dict[str, Any] = dict(device=hidden.device, dtype=hidden.dtype)
        self.products = torch.empty(count, up.shape[1], **make)
        self.activations = torch.empty(count, self.intermediate, **make)
        self.results = torch.empty(count, hidden.shape[1], **make)
        self.out = torch.empty_like(hidden) if self.top_k > 1 else self.results
        padded = count + self.experts * 127
        self.rows = torch.empty(padded, device=hidden.device, dtype=torch.int32)
        self.tile_experts = torch.empty(padded // 16 + 1, device=hidden.device, dtype=torch.int32)
        self.padded = torch.empty(1, device=hidden.device, dtype=torch.int32)
        self.padded_alone: dict[int, Tensor] = {}

    def __call__(self, tile: tuple[int, ...]) -> Tensor:
        """Enqueues the layer with this tile; its result."""
        count = self.tokens * self.top_k
        # vLLM leaves out the padding where so few rows fall on so many experts.
        alone = count * 4 <= self.experts
        if alone:
            size = count * tile[0]
            rows, tile_experts = self.rows, self.ids.view(-1)
            if size not in self.padded_alone:
                self.padded_alone[size] = torch.full_like(self.padded, size)
            padded = self.padded_alone[size]
        else:
            active, active_count, order = self.plan()
            _pad_rows[(self.experts,)](
                active, active_count, order, self.rows, self.tile_experts, self.padded,
                E=self.experts, BLOCK=tile[0], SIZE=count,
            )  # fmt: skip
            rows, tile_experts, padded = self.rows, self.tile_experts, self.padded
            size = min(count * tile[0], count + self.experts * (tile[0] - 1))
        tiles = (rows, tile_experts, padded, size, alone, tile)
        self._product(self.hidden, self.up, self.products, self.top_k, False, *tiles)
        block = 1024
        _activate[(count, triton.cdiv(self.intermediate, block))](
            self.products, self.activations, self.intermediate, GATED=self.gated, BLOCK=block
        )
        self._product(self.activations, self.down, self.results, 1, True, *tiles)
        if self.top_k > 1:
            hidden = self.hidden.shape[1]
            _sum_choices[(self.tokens, triton.cdiv(hidden, block))](
                self.results, self.out, hidden, K=self.top_k, BLOCK=block
            )
        return self.out

    def _product(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        top_k: int,
        weighted: bool,
        rows: Tensor,
        experts: Tensor,
        padded: Tensor,
        size: int,
        alone: bool,
        tile: tuple[int, ...],
    ) -> None:
        block_rows, outputs, depth, group, warps, stages = tile
        grid = (triton.cdiv(size, block_rows) * triton.cdiv(b.shape[1], outputs),)
        fused_moe_kernel[grid](
            a, b, c, None, None, None, self.weights, rows, experts, padded,
            b.shape[1], b.shape[2], size, self.tokens * self.top_k,
            a.stride(0), a.stride(1), b.stride(0), b.stride(2), b.stride(1),
            c.stride(0), c.stride(1),
            0, 0, 0, 0, 0, 0, 0, 0, 0, alone,
            BLOCK_SIZE_M=block_rows, BLOCK_SIZE_N=outputs, BLOCK_SIZE_K=depth, GROUP_SIZE_M=group,
            SPLIT_K=1, MUL_ROUTED_WEIGHT=weighted, top_k=top_k, compute_type=tl.bfloat16,
            use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, per_channel_quant=False,
            HAS_BIAS=False, SWAP_AB=False, num_warps=warps, num_stages=stages,
        )  # fmt: skip
