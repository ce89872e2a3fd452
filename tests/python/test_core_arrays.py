# SPDX-License-Identifier: Apache-2.0
"""Arrays cross by DLPack: what is taken, what is refused and how, and what comes back."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from reference import moe, random_experts

from sida import ExpertCache, ExpertStore, HashTable, MoeConfig, OffloadScheduler
from sida._core import OffloadedExperts, batch_key

TOKENS = 5


def config_of(dtype: str) -> MoeConfig:
    return MoeConfig(layers=1, experts=4, hidden_size=8, intermediate_size=16, top_k=2, dtype=dtype)


def layer_of(config: MoeConfig, experts: Any, memory: Any = 1.0) -> OffloadedExperts:
    cache = ExpertCache(ExpertStore.from_arrays(config, experts), memory)
    return OffloadedExperts(OffloadScheduler(cache), 0, threads=1)


def inputs(config: MoeConfig, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(TOKENS, config.hidden_size)).astype(np.float32)
    ids = np.argsort(random.random((TOKENS, config.experts)), axis=1)[:, : config.top_k]
    weights = random.random((TOKENS, config.top_k)).astype(np.float32)
    return hidden, np.ascontiguousarray(ids), weights


TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
TOLERANCE = {"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3}


def relative(out: Any, expected: np.ndarray) -> float:
    values = np.asarray(out).astype(np.float64)
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_torch_in_torch_out(dtype: str) -> None:
    config = config_of(dtype)
    experts = random_experts(config)
    hidden, ids, weights = inputs(config)
    rounded = torch.from_numpy(hidden).to(TORCH[dtype])
    out = layer_of(config, experts).forward(
        rounded, torch.from_numpy(ids), torch.from_numpy(weights)
    )
    assert isinstance(out, torch.Tensor)
    assert out.dtype == TORCH[dtype]
    assert out.shape == hidden.shape
    expected = moe(config, experts[0], rounded.float().numpy(), ids, weights)
    assert relative(out.float(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_numpy_in_numpy_out(dtype: str) -> None:
    config = config_of(dtype)
    experts = random_experts(config)
    hidden, ids, weights = inputs(config)
    rounded = hidden.astype(NUMPY[dtype])
    out = layer_of(config, experts).forward(rounded, ids.astype(np.int32), weights)
    assert isinstance(out, np.ndarray)
    assert out.dtype == NUMPY[dtype]
    expected = moe(config, experts[0], rounded.astype(np.float32), ids, weights)
    assert relative(out, expected) < TOLERANCE[dtype]


def test_weights_may_be_torch_parameters_that_are_detached() -> None:
    config = config_of("bf16")
    experts = random_experts(config)
    tensors = [
        [
            tuple(
                None
                if part is None
                else torch.from_numpy(part.view(np.uint16)).view(torch.bfloat16).contiguous()
                for part in expert
            )
            for expert in experts[0]
        ]
    ]
    hidden, ids, weights = inputs(config)
    rounded = torch.from_numpy(hidden).bfloat16()
    arguments = (rounded, torch.from_numpy(ids), torch.from_numpy(weights))
    expected = layer_of(config, experts).forward(*arguments)
    assert torch.equal(layer_of(config, tensors).forward(*arguments), expected)


def test_the_default_device_of_torch_does_not_decide_where_results_are() -> None:
    config = config_of("f32")
    hidden, ids, weights = (torch.from_numpy(array) for array in inputs(config))
    layer = layer_of(config, random_experts(config))
    with torch.device("meta"):
        assert layer.forward(hidden, ids, weights).device.type == "cpu"


def test_out_is_written_to() -> None:
    config = config_of("f32")
    layer = layer_of(config, random_experts(config))
    hidden, ids, weights = inputs(config)
    out = np.full_like(hidden, np.nan)
    assert layer.forward(hidden, ids, weights, out=out) is out
    assert np.array_equal(out, layer.forward(hidden, ids, weights))


def test_read_only_arrays_are_read_and_never_written() -> None:
    config = config_of("f32")
    layer = layer_of(config, random_experts(config))
    arrays = inputs(config)
    for array in arrays:
        array.flags.writeable = False
    out = layer.forward(*arrays)
    assert out.flags.writeable
    with pytest.raises(ValueError, match=r"out: expected an array that can be written to"):
        layer.forward(*arrays, out=arrays[0])


class Legacy:
    """An array of a library from before DLPack 1.0: no max_version, unversioned capsules."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__()


class Newer:
    """Hands out versioned capsules, and notes that 1.x was asked for."""

    asked: tuple[int, int] | None = None

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **rest: Any) -> Any:
        self.asked = max_version
        return self.array.__dlpack__(max_version=max_version)


def test_both_forms_of_dlpack() -> None:
    ids = np.arange(6, dtype=np.int64).reshape(2, 3)
    newer = Newer(ids)
    assert batch_key(ids) == batch_key(Legacy(ids)) == batch_key(newer)
    assert newer.asked is not None
    assert newer.asked[0] == 1
    assert batch_key(ids) != batch_key(ids + 1)


def test_capsules_are_released_also_when_refused() -> None:
    config = config_of("f32")
    layer = layer_of(config, random_experts(config))
    hidden, ids, weights = inputs(config)
    references = []
    for array in (hidden, hidden.astype(np.float64), hidden[:, ::2], hidden.astype(np.complex64)):
        copy = array if array.base is not None else array.copy()
        holder = np.lib.stride_tricks.as_strided(copy)  # a view of its own, that can be gone
        references.append(weakref.ref(holder))
        try:
            layer.forward(holder, ids, weights)
        except ValueError:
            pass
        del holder, copy
    gc.collect()
    assert [reference() is None for reference in references] == [True] * 4


def test_arrays_of_experts_live_as_long_as_the_store() -> None:
    config = config_of("f32")
    experts = random_experts(config)
    kept = weakref.ref(experts[0][0][0])
    expected = layer_of(config, random_experts(config)).forward(*inputs(config))
    layer = layer_of(config, experts)
    del experts
    gc.collect()
    assert kept() is not None
    assert np.array_equal(layer.forward(*inputs(config)), expected)
    del layer
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, ::2], r"hidden_states: .*\.contiguous\(\).*ascontiguousarray"),
        (lambda x: x.T, r"hidden_states: .*contiguous"),
        (lambda x: x.astype(np.complex64), r"hidden_states: expected a dtype among float32"),
        (lambda x: x.astype(np.int16), r"hidden_states: expected a dtype among float32"),
        (lambda x: x.astype(np.float16), r"f16"),
        (lambda x: np.ascontiguousarray(x[:, :4]), r"\[5, 4\]"),
        (lambda x: np.zeros((0, 3, 8), np.float32), r"\[0, 3, 8\]"),
    ],
)
def test_what_does_not_fit_is_a_value_error_that_says_so(change: Any, message: str) -> None:
    config = config_of("f32")
    layer = layer_of(config, random_experts(config))
    hidden, ids, weights = inputs(config)
    with pytest.raises(ValueError, match=message):
        layer.forward(change(hidden), ids, weights)


def test_unaligned_memory_is_refused() -> None:
    hidden, ids, weights = inputs(config_of("f32"))
    raw = np.zeros(hidden.nbytes + 1, np.uint8)
    shifted = raw[1:].view(np.float32).reshape(hidden.shape)
    layer = layer_of(config_of("f32"), random_experts(config_of("f32")))
    with pytest.raises(ValueError, match="aligned"):
        layer.forward(shifted, ids, weights)


def test_another_device_is_refused() -> None:
    class OnGpu:
        def __dlpack__(self, **_: Any) -> Any:
            return capsule_on_device(2, 1)

    with pytest.raises(ValueError, match=r"ids: expected an array in RAM.* got one on cuda:1"):
        batch_key(OnGpu())


def test_a_dlpack_of_another_major_version_is_refused() -> None:
    class Future:
        def __dlpack__(self, **_: Any) -> Any:
            return capsule_on_device(1, 0, major=2)

    with pytest.raises(ValueError, match=r"ids: expected DLPack 1\.x, got 2"):
        batch_key(Future())


def test_a_tensor_that_requires_grad_is_refused() -> None:
    config = config_of("f32")
    layer = layer_of(config, random_experts(config))
    hidden, ids, weights = (torch.from_numpy(array) for array in inputs(config))
    with pytest.raises(BufferError, match="detach"):
        layer.forward(hidden.requires_grad_(), ids, weights)


def test_no_array_at_all() -> None:
    with pytest.raises(TypeError, match=r"ids: expected an array with __dlpack__.*list"):
        batch_key([1, 2, 3])  # type: ignore[arg-type]

    class Wrong:
        def __dlpack__(self, **_: Any) -> Any:
            return 3

    with pytest.raises(TypeError):
        batch_key(Wrong())


def test_exceptions_of_an_array_are_passed_on() -> None:
    class Broken:
        def __dlpack__(self, **_: Any) -> Any:
            raise BufferError("not today")

    with pytest.raises(BufferError, match="not today"):
        batch_key(Broken())


def test_masks_may_be_bool_uint8_or_integers() -> None:
    ids = np.arange(4)
    mask = np.array([1, 1, 0, 1])
    keys = {
        batch_key(ids, mask.astype(dtype)) for dtype in (np.bool_, np.uint8, np.int32, np.int64)
    }
    assert len(keys) == 1
    assert keys != {batch_key(ids)}
    assert batch_key(ids, np.ones(4, np.int64)) == batch_key(ids)
    assert batch_key(torch.from_numpy(ids), torch.from_numpy(mask).bool()) in keys
    with pytest.raises(ValueError, match="mask"):
        batch_key(ids, mask.astype(np.float32))
    with pytest.raises(ValueError, match="mask"):
        batch_key(ids, mask[:2].copy())


def test_tables_take_whatever_numpy_takes() -> None:
    table = HashTable(
        layers=1, candidates=1, keys=[1], offsets=[0, 2], ids=[[[0], [1]]],
        probs=torch.ones(1, 2, 1), scale=np.ones((1, 2, 1)),
    )  # fmt: skip
    assert table.ids.tolist() == [[[0], [1]]]


def capsule_on_device(device_type: int, device_id: int, *, major: int = 1) -> Any:
    """A versioned capsule made by hand, of three int64."""
    import ctypes as c

    class Tensor(c.Structure):
        _fields_ = (
            ("data", c.c_void_p), ("device_type", c.c_int32), ("device_id", c.c_int32),
            ("ndim", c.c_int32), ("code", c.c_uint8), ("bits", c.c_uint8), ("lanes", c.c_uint16),
            ("shape", c.POINTER(c.c_int64)), ("strides", c.c_void_p), ("byte_offset", c.c_uint64),
        )  # fmt: skip

    class Managed(c.Structure):
        _fields_ = (
            ("major", c.c_uint32), ("minor", c.c_uint32), ("context", c.c_void_p),
            ("deleter", c.c_void_p), ("flags", c.c_uint64), ("tensor", Tensor),
        )  # fmt: skip

    data, shape = (c.c_int64 * 3)(1, 2, 3), (c.c_int64 * 1)(3)
    tensor = Tensor(c.addressof(data), device_type, device_id, 1, 0, 64, 1, shape, None, 0)
    managed = Managed(major, 0, None, None, 0, tensor)
    ALIVE.append((data, shape, managed))
    new = c.pythonapi.PyCapsule_New
    new.restype, new.argtypes = c.py_object, (c.c_void_p, c.c_char_p, c.c_void_p)
    return new(c.addressof(managed), b"dltensor_versioned", None)


ALIVE: list[Any] = []
