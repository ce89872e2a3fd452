# SPDX-License-Identifier: Apache-2.0
"""sida's kernels beside a loop over experts whose products are cuBLAS's, called through torch."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpu import needs_gpu

import sida

pytestmark = needs_gpu

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
SHAPES = [  # tokens, top_k, experts, hidden, intermediate
    (1, 2, 8, 256, 192),
    (3, 8, 64, 512, 384),
    (40, 2, 8, 256, 192),
    (700, 2, 8, 512, 384),
    (400, 1, 4, 768, 3072),
    (1, 2, 8, 67, 45),  # odd sizes are `general`'s
    (500, 3, 5, 131, 77),
]


def by_cublas(
    hidden: Any, ids: Any, weights: Any, up: Any, down: Any, gated: bool, dtype: Any
) -> Any:
    """The layer as a loop with two products of cuBLAS an expert, all in `dtype`."""
    hidden, up, down, weights = (part.to(dtype) for part in (hidden, up, down, weights))
    out = torch.zeros_like(hidden)
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        inner = hidden[token] @ up[expert].T
        if gated:
            gate, beside = inner.chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * beside
        else:
            inner = inner.relu()
        rows = (inner @ down[expert].T) * weights[token, choice].unsqueeze(-1)
        out.index_add_(0, token, rows)
    return out


def distance(out: Any, expected: Any) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def full_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).partition(".")[2])
def test_as_close_to_float64_as_cublas(dtype: Any, shape: tuple[int, ...], gated: bool) -> None:
    tokens, top_k, experts, hidden_size, intermediate = shape
    generator = torch.Generator("cuda").manual_seed(sum(shape))

    def random(*sizes: int) -> Any:
        return torch.randn(*sizes, device="cuda", generator=generator)

    up = (random(experts, (1 + gated) * intermediate, hidden_size) * hidden_size**-0.5).to(dtype)
    down = (random(experts, hidden_size, intermediate) * intermediate**-0.5).to(dtype)
    hidden = random(tokens, hidden_size).to(dtype)
    ids = random(tokens, experts).topk(top_k, -1).indices
    weights = random(tokens, top_k).abs() + 0.1
    arrays = (hidden, ids, weights, up, down, gated)
    exact, peer = by_cublas(*arrays, torch.float64), by_cublas(*arrays, dtype)
    activation = "silu" if gated else "relu"
    with sida.OffloadedExperts(up, down, gated=gated, activation=activation, memory=1.0) as layer:
        out = layer(hidden, ids, weights)
    assert distance(out, exact) <= LIMITS[dtype]
    assert distance(out, peer) <= 2 * LIMITS[dtype]
    # of a few float32 terms it is chance whose sum is the closer one
    assert distance(out, exact) <= max(1.25 * distance(peer, exact), 5e-7)
