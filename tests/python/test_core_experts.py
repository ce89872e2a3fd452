# SPDX-License-Identifier: Apache-2.0
"""The compiled layer against NumPy in float64, at every budget and policy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from reference import moe, random_experts

from sida import ExpertCache, ExpertStore, HashTable, MoeConfig, OffloadScheduler
from sida._core import OffloadedExperts

POLICIES = ("fifo", "lru", "lfu", "lookahead", "auto")


def routing(config: MoeConfig, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(tokens, config.hidden_size)).astype(np.float32)
    order = np.argsort(random.random((tokens, config.experts)), axis=1)
    ids = np.ascontiguousarray(order[:, : config.top_k])
    return hidden, ids, random.random((tokens, config.top_k)).astype(np.float32)


def scheduler_of(
    config: MoeConfig, experts: Any, memory: Any, policy: str = "auto"
) -> OffloadScheduler:
    store = ExpertStore.from_arrays(config, experts)
    return OffloadScheduler(ExpertCache(store, memory, policy=policy))


@pytest.mark.parametrize(
    ("activation", "gated", "biases"),
    list(
        itertools.product(
            ("relu", "relu2", "gelu", "gelu_tanh", "silu"), (False, True), (False, True)
        )
    ),
)
def test_agrees_with_the_formula(activation: str, gated: bool, biases: bool) -> None:
    config = MoeConfig(
        layers=2,
        experts=5,
        hidden_size=24,
        intermediate_size=40,
        top_k=2,
        activation=activation,
        gated=gated,
        up_bias=biases,
        down_bias=biases,
    )
    experts = random_experts(config)
    scheduler = scheduler_of(config, experts, "1 expert")
    for layer in range(config.layers):
        hidden, ids, weights = routing(config, 7, seed=layer)
        out = OffloadedExperts(scheduler, layer, threads=1).forward(hidden, ids, weights)
        expected = moe(config, experts[layer], hidden, ids, weights)
        assert np.linalg.norm(out - expected) / np.linalg.norm(expected) < 1e-5


def test_the_same_bits_at_every_budget_policy_and_number_of_threads() -> None:
    config = MoeConfig(layers=3, experts=6, hidden_size=16, intermediate_size=32, top_k=2)
    experts = random_experts(config)
    cases = [routing(config, 9, seed) for seed in range(2 * config.layers)]

    def run(memory: Any, policy: str, threads: int) -> bytes:
        scheduler = scheduler_of(config, experts, memory, policy)
        layers = [OffloadedExperts(scheduler, i, threads=threads) for i in range(config.layers)]
        outputs = []
        for i, case in enumerate(cases):
            if i % config.layers == 0:
                scheduler.begin_pass()
            outputs.append(layers[i % config.layers].forward(*case))
        return np.stack(outputs).tobytes()

    expected = run(1.0, "auto", 1)
    for memory, policy in itertools.product(("1 expert", "4 experts", 0.5, 1.0), POLICIES):
        assert run(memory, policy, 2) == expected, (memory, policy)


def test_leaving_one_expert_out_would_be_seen() -> None:
    config = MoeConfig(layers=1, experts=4, hidden_size=16, intermediate_size=32, top_k=1)
    experts = random_experts(config)
    hidden, ids, weights = routing(config, 16, seed=0)
    full = moe(config, experts[0], hidden, ids, weights)
    left_out = moe(config, experts[0], hidden, ids, np.where(ids == ids[0], 0, weights))
    assert np.linalg.norm(full - left_out) / np.linalg.norm(full) > 1e-2


def test_weights_of_zero_leave_a_choice_out() -> None:
    config = MoeConfig(layers=1, experts=4, hidden_size=8, intermediate_size=8, top_k=2)
    scheduler = scheduler_of(config, random_experts(config), 1.0)
    layer = OffloadedExperts(scheduler, 0)
    hidden = np.ones((2, 8), np.float32)
    ids = np.array([[0, 1], [0, 2]])
    out = layer.forward(hidden, ids, np.array([[1, 0], [0, 0]], np.float32))
    assert np.all(out[1] == 0)
    assert scheduler.stats()["uses"] == 1


def test_no_tokens_give_no_rows() -> None:
    config = MoeConfig(layers=1, experts=4, hidden_size=8, intermediate_size=8)
    layer = OffloadedExperts(scheduler_of(config, random_experts(config), "1 expert"), 0)
    empty = np.zeros((0, 8), np.float32)
    out = layer.forward(empty, np.zeros((0, 1), np.int64), np.zeros((0, 1), np.float32))
    assert out.shape == (0, 8)


@pytest.mark.parametrize("bad", [-1, 4, 2**31, -(2**40)])
def test_ids_out_of_range_raise_and_write_nothing(bad: int) -> None:
    config = MoeConfig(layers=1, experts=4, hidden_size=8, intermediate_size=8)
    layer = OffloadedExperts(scheduler_of(config, random_experts(config), 1.0), 0)
    hidden = np.ones((3, 8), np.float32)
    out = np.full((3, 8), 7, np.float32)
    with pytest.raises(IndexError, match=str(bad)):
        layer.forward(hidden, np.array([[0], [bad], [1]]), np.ones((3, 1), np.float32), out=out)
    assert np.all(out == 7)
    assert np.isfinite(
        layer.forward(hidden, np.zeros((3, 1), np.int64), np.ones((3, 1), np.float32))
    ).all()


@pytest.mark.parametrize(
    ("ids", "weights"),
    [
        (np.zeros((2, 1), np.int64), np.ones((3, 1), np.float32)),
        (np.zeros((3, 2), np.int64), np.ones((3, 1), np.float32)),
        (np.zeros((3,), np.int64), np.ones((3, 1), np.float32)),
        (np.zeros((3, 1), np.float32), np.ones((3, 1), np.float32)),
        (np.zeros((3, 1), np.int64), np.ones((3, 1), np.int64)),
    ],
)
def test_routing_that_does_not_fit(ids: np.ndarray, weights: np.ndarray) -> None:
    config = MoeConfig(layers=1, experts=4, hidden_size=8, intermediate_size=8)
    layer = OffloadedExperts(scheduler_of(config, random_experts(config), 1.0), 0)
    with pytest.raises(ValueError, match="expected"):
        layer.forward(np.ones((3, 8), np.float32), ids, weights)


def test_out_that_does_not_fit() -> None:
    config = MoeConfig(layers=1, experts=4, hidden_size=8, intermediate_size=8)
    layer = OffloadedExperts(scheduler_of(config, random_experts(config), 1.0), 0)
    case = (np.ones((3, 8), np.float32), np.zeros((3, 1), np.int64), np.ones((3, 1), np.float32))
    for out in (np.zeros((2, 8), np.float32), np.zeros((3, 8), np.float16)):
        with pytest.raises(ValueError, match="expected"):
            layer.forward(*case, out=out)


def test_layers_are_counted_from_zero() -> None:
    config = MoeConfig(layers=2, experts=4, hidden_size=8, intermediate_size=8)
    scheduler = scheduler_of(config, random_experts(config), 1.0)
    for layer in (-1, 2):
        with pytest.raises(IndexError, match=str(layer)):
            OffloadedExperts(scheduler, layer)


def table_of(ids: np.ndarray, scale: np.ndarray, key: int = 1) -> HashTable:
    layers, tokens, candidates = ids.shape
    return HashTable(
        layers=layers,
        candidates=candidates,
        keys=[key],
        offsets=[0, tokens],
        ids=ids,
        probs=(ids >= 0).astype(np.float32),
        scale=scale,
    )


def test_predicted_routing_takes_experts_and_scales_from_the_table() -> None:
    config = MoeConfig(layers=2, experts=5, hidden_size=8, intermediate_size=16, top_k=2)
    experts = random_experts(config)
    hidden, first, scale = routing(config, 6, seed=3)
    third = (first.max(axis=1, keepdims=True) + 1) % 5  # a candidate beyond top_k: not run
    ids = np.stack([np.concatenate([first, third], 1), np.full((6, 3), -1)])
    ids[0, 2] = -1  # padding
    scales = np.stack([np.concatenate([scale, np.ones((6, 1))], 1), np.zeros((6, 3))])
    scheduler = scheduler_of(config, experts, "2 experts")
    layers = [OffloadedExperts(scheduler, i) for i in range(2)]
    scheduler.begin_pass(table_of(ids, scales), key=1)
    assert [layer.has_prediction() for layer in layers] == [True, False]
    out = layers[0].forward_predicted(hidden)
    expected = moe(config, experts[0], hidden, first, scale)
    expected[2] = 0
    assert np.linalg.norm(out - expected) / np.linalg.norm(expected) < 1e-5
    assert np.all(out[2] == 0)
    with pytest.raises(RuntimeError, match=r"foretells"):
        layers[1].forward_predicted(hidden)
    with pytest.raises(ValueError, match="6 tokens"):
        layers[0].forward_predicted(hidden[:4])
    scheduler.end_pass()
    with pytest.raises(RuntimeError, match="no hash table"):
        layers[0].forward_predicted(hidden)
    stats = scheduler.stats()["layers"]
    assert [layer["predicted_calls"] for layer in stats] == [1, 0]


def test_skip_padding_leaves_rows_out_and_exact_mode_does_not() -> None:
    config = MoeConfig(layers=1, experts=4, hidden_size=8, intermediate_size=8)
    experts = random_experts(config)
    hidden = np.ones((4, 8), np.float32)
    ids, weights = np.array([[0], [1], [2], [3]]), np.ones((4, 1), np.float32)
    expected = moe(config, experts[0], hidden, ids, weights)
    mask = np.array([1, 1, 0, 0])
    for skip in (False, True):
        scheduler = scheduler_of(config, experts, "1 expert")
        layer = OffloadedExperts(scheduler, 0, skip_padding=skip)
        scheduler.begin_pass(mask=mask)
        out = layer.forward(hidden, ids, weights)
        assert np.allclose(out, expected * mask[:, None] if skip else expected, atol=1e-6)
        assert scheduler.stats()["uses"] == 2  # padding counts in no rate


def test_threads_can_be_set() -> None:
    config = MoeConfig(layers=1, experts=4, hidden_size=8, intermediate_size=8)
    layer = OffloadedExperts(scheduler_of(config, random_experts(config), 1.0), 0, threads=1)
    case = routing(config, 5, seed=0)
    expected = layer.forward(*case)
    layer.set_threads(3)
    assert np.array_equal(layer.forward(*case), expected)
    with pytest.raises(ValueError, match="thread"):
        layer.set_threads(0)
