# SPDX-License-Identifier: Apache-2.0
"""Configs, stores and caches from Python."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import moe, random_experts
from safetensors.numpy import save_file

from sida import ExpertCache, ExpertStore, MoeConfig, OffloadScheduler
from sida._core import OffloadedExperts

CONFIG = MoeConfig(layers=2, experts=4, hidden_size=8, intermediate_size=16)


def arrays_store(config: MoeConfig = CONFIG) -> ExpertStore:
    return ExpertStore.from_arrays(config, random_experts(config))


def save_switch(path: Path, config: MoeConfig, **changes: Any) -> list[Any]:
    experts = random_experts(config)
    tensors = {}
    for layer, per_layer in enumerate(experts):
        for expert, (up, down, _, _) in enumerate(per_layer):
            name = f"encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}"
            tensors[f"{name}.wi.weight"] = up
            tensors[f"{name}.wo.weight"] = down
    save_file(tensors | changes, path)
    return experts


def test_a_config_says_what_it_is() -> None:
    assert CONFIG.slab_bytes >= 4 * 2 * 8 * 16
    assert CONFIG.total_experts == 8
    assert (CONFIG.top_k, CONFIG.activation, CONFIG.gated, CONFIG.dtype) == (
        1,
        "relu",
        False,
        "f32",
    )
    same = MoeConfig(layers=2, experts=4, hidden_size=8, intermediate_size=16)
    assert same == CONFIG
    assert (CONFIG == 3) is False
    assert eval(repr(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers > 0, got 0"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"top_k": 5}, r"top_k <= experts \(4\), got 5"),
        ({"activation": "swish"}, "relu, relu2, gelu.*silu_clamped, swiglu_clamped.*swish"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "i64"}, "i64"),
    ],
)
def test_configs_that_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {
        "layers": 2, "experts": 4, "hidden_size": 8, "intermediate_size": 16
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        MoeConfig(**(values | changes))
    with pytest.raises(TypeError):
        MoeConfig(2, 4, 8, 16)  # type: ignore[misc,call-arg]


def test_a_checkpoint_is_read_without_python(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    experts = save_switch(path, CONFIG)
    store = ExpertStore.open(path)
    assert store.config == CONFIG
    assert store.layer_names == [f"encoder.block.{i}.layer.1.mlp" for i in range(2)]
    slab = store.read(1, 2)
    assert slab.dtype == np.uint8
    assert slab.shape == (store.slab_bytes,) == (CONFIG.slab_bytes,)
    for name in ("up", "down"):
        part = experts[1][2][("up", "down").index(name)]
        assert part.tobytes() in slab.tobytes()
    with pytest.raises(IndexError):
        store.read(2, 0)
    with pytest.raises(IndexError):
        store.read(0, 4)


def test_layers_dtype_and_config_of_a_checkpoint_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_switch(path, CONFIG)
    first = ExpertStore.open(str(path), layers=["encoder.block.1.layer.1.mlp"], dtype="bf16")
    assert (first.config.layers, first.config.dtype) == (1, "bf16")
    assert first.slab_bytes < CONFIG.slab_bytes
    gelu = MoeConfig(layers=2, experts=4, hidden_size=8, intermediate_size=16, activation="gelu")
    assert ExpertStore.open(path, config=gelu).config == gelu
    wrong = MoeConfig(layers=2, experts=5, hidden_size=8, intermediate_size=16)
    with pytest.raises(ValueError, match="expert"):
        ExpertStore.open(path, config=wrong)
    with pytest.raises(ValueError, match="no_such_layer"):
        ExpertStore.open(path, layers=["no_such_layer"])
    with pytest.raises(ValueError, match="f31"):
        ExpertStore.open(path, dtype="f31")


def test_checkpoints_that_are_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing_here"):
        ExpertStore.open(tmp_path / "nothing_here")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="MoE layers"):
        ExpertStore.open(tmp_path / "dense.safetensors")
    path = tmp_path / "model.safetensors"
    save_switch(path, CONFIG)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ExpertStore.open(path)


def test_a_file_that_shrinks_later_ends_in_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_switch(path, CONFIG)
    scheduler = OffloadScheduler(ExpertCache(ExpertStore.open(path), "1 expert"))
    layer = OffloadedExperts(scheduler, 1)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    case = (np.ones((8, 8), np.float32), np.arange(8)[:, None] % 4, np.ones((8, 1), np.float32))
    for _ in range(2):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            layer.forward(*case)


def test_arrays_must_be_what_the_config_says() -> None:
    experts = random_experts(CONFIG)
    up, down, _, _ = experts[0][0]
    for wrong, message in (
        ((down, up, None, None), r"layer 0, expert 1: up: expected \[16, 8\] f32, got \[8, 16\]"),
        ((up.astype(np.float16), down, None, None), r"up: expected .* f32, got .* f16"),
        ((up, down, up[:, 0].copy(), None), r"up_bias: expected None"),
        ((up, None, None, None), r"down: expected an array"),
        ((up, down), r"expected \(up, down, up_bias, down_bias\), got 2"),
    ):
        broken = [list(layer) for layer in experts]
        broken[0][1] = wrong
        with pytest.raises(ValueError, match=message):
            ExpertStore.from_arrays(CONFIG, broken)
    with pytest.raises(ValueError, match="expected 2 layers, got 1"):
        ExpertStore.from_arrays(CONFIG, experts[:1])
    with pytest.raises(ValueError, match="expected 4 in layer 1, got 3"):
        ExpertStore.from_arrays(CONFIG, [experts[0], experts[1][:3]])


def test_a_throttled_store_takes_its_time_and_changes_nothing() -> None:
    store = arrays_store()
    slow = store.throttled(bytes_per_second=1e9, latency_seconds=0.02)
    assert slow.config == store.config
    begin = time.monotonic()
    slab = slow.read(1, 3)
    assert time.monotonic() - begin >= 0.02
    assert np.array_equal(slab, store.read(1, 3))
    for bandwidth, latency in ((0, 0), (-1, 0), (1, -1), (float("nan"), 0)):
        with pytest.raises(ValueError, match="expected"):
            store.throttled(bytes_per_second=bandwidth, latency_seconds=latency)


@pytest.mark.parametrize(
    ("memory", "slots"),
    [
        ("1 expert", 1),
        ("3 experts", 3),
        ("100 experts", 8),
        (0.5, 4),
        (np.float64(0.5), 4),
        (1.0, 8),
        (2.5, 8),
        ("25%", 2),
        ("0.25", 2),
        (2 * CONFIG.slab_bytes, 2),
        (np.int64(2 * CONFIG.slab_bytes + 1), 2),
        (f"{3 * CONFIG.slab_bytes} bytes", 3),
        ("1 GiB", 8),
        (2**80, 8),
    ],
)
def test_what_budgets_buy(memory: Any, slots: int) -> None:
    store = arrays_store()
    cache = ExpertCache(store, memory)
    assert cache.slots == store.slots(memory) == slots
    assert cache.slot_bytes == CONFIG.slab_bytes
    assert cache.in_place == (slots == 8)
    assert cache.capacity_bytes == (0 if cache.in_place else slots * CONFIG.slab_bytes)


@pytest.mark.parametrize(
    "memory",
    [
        0,
        -1,
        1,
        0.0,
        -0.5,
        0.01,
        float("nan"),
        "0 experts",
        "0%",
        "12",
        "lots",
        "",
        "1 GB/s",
        -(2**80),
    ],
)
def test_budgets_that_buy_nothing_name_the_smallest(memory: Any) -> None:
    with pytest.raises(ValueError, match=r"memory: .*expert"):
        ExpertCache(arrays_store(), memory)


@pytest.mark.parametrize("memory", [None, True, [1], b"1 expert"])
def test_budgets_of_another_type(memory: Any) -> None:
    with pytest.raises(TypeError, match="memory: expected bytes"):
        ExpertCache(arrays_store(), memory)


def test_one_byte_is_told_about_fractions_and_counts() -> None:
    with pytest.raises(ValueError, match=r'1\.0.*"1 expert"|"1 expert".*1\.0'):
        ExpertCache(arrays_store(), 1)


def test_policies_and_devices_go_by_name() -> None:
    for policy in ("fifo", "lru", "lfu", "lookahead"):
        assert ExpertCache(arrays_store(), 0.5, policy=policy).policy == policy
    cache = ExpertCache(arrays_store(), 0.5)
    assert (cache.policy, cache.device) == ("lookahead", "cpu")
    with pytest.raises(ValueError, match=r"fifo, lru, lfu, lookahead or auto.*belady"):
        ExpertCache(arrays_store(), 0.5, policy="belady")
    with pytest.raises(ValueError, match=r'expected "cpu", "cuda".*got "gpu"'):
        ExpertCache(arrays_store(), 0.5, device="gpu")
    with pytest.raises(ValueError, match=r"host_memory= .*cuda"):
        ExpertCache(arrays_store(), 0.5, host_memory=0.5)


@pytest.mark.parametrize("policy", ["fifo", "lru", "lfu", "lookahead"])
def test_residents_never_exceed_the_slots(policy: str) -> None:
    experts = random_experts(CONFIG)
    cache = ExpertCache(ExpertStore.from_arrays(CONFIG, experts), "3 experts", policy=policy)
    assert cache.resident() == []
    scheduler = OffloadScheduler(cache)
    layers = [OffloadedExperts(scheduler, i) for i in range(2)]
    random = np.random.default_rng(0)
    for step in range(12):
        hidden = random.normal(size=(5, 8)).astype(np.float32)
        ids = random.integers(0, 4, (5, 1))
        out = layers[step % 2].forward(hidden, ids, np.ones((5, 1), np.float32))
        expected = moe(CONFIG, experts[step % 2], hidden, ids, np.ones((5, 1)))
        assert np.allclose(out, expected, atol=1e-5)
        assert 1 <= len(cache.resident()) == len(set(cache.resident())) <= 3
        assert all(0 <= layer < 2 and 0 <= expert < 4 for layer, expert in cache.resident())


def test_a_cache_is_resized_and_works_on() -> None:
    experts = random_experts(CONFIG)
    cache = ExpertCache(ExpertStore.from_arrays(CONFIG, experts), "1 expert")
    scheduler = OffloadScheduler(cache)
    layer = OffloadedExperts(scheduler, 0)
    case = (np.ones((4, 8), np.float32), np.arange(4)[:, None], np.ones((4, 1), np.float32))
    expected = layer.forward(*case)
    for resize in (cache.resize, scheduler.resize):
        for memory, slots in (("3 experts", 3), (1.0, 8), ("1 expert", 1)):
            resize(memory)
            assert cache.slots == slots
            assert np.array_equal(layer.forward(*case), expected)
        with pytest.raises(ValueError, match="expert"):
            resize(0)
        assert cache.slots == 1
        assert np.array_equal(layer.forward(*case), expected)
