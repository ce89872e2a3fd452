# SPDX-License-Identifier: Apache-2.0
"""The experts of a MoE layer of one's own on a GPU, against float64 and the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu import needs_gpu
from test_layer import Case

import sida

pytestmark = needs_gpu

LIMITS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}


def tensor(array: Any) -> Any:
    """A NumPy array as a tensor on the GPU; bfloat16 too."""
    if array is None:
        return None
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to("cuda")
    return torch.from_numpy(array).to("cuda")


def layer_of(case: Case, memory: Any, **options: Any) -> sida.OffloadedExperts:
    return sida.OffloadedExperts(
        tensor(case.up), tensor(case.down), gated=case.gated, activation=case.activation,
        memory=memory, up_bias=tensor(case.up_bias), down_bias=tensor(case.down_bias), **options,
    )  # fmt: skip


def error(out: Any, case: Case) -> float:
    expected, _ = case.expected()
    return float(np.linalg.norm(out.double().cpu().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    "shape", [{}, {"hidden": 33, "intermediate": 17, "tokens": 7}, {"top_k": 6, "tokens": 64}]
)
def test_the_layers_numbers_and_the_same_bits_at_every_budget(
    dtype: str, ids_dtype: str, shape: dict[str, int]
) -> None:
    case = Case(
        gated=True, biases=True, activation="silu", dtype=dtype, ids_dtype=ids_dtype, **shape
    )
    outputs = []
    for memory in ("1 expert", 0.5, 1.0):
        with layer_of(case, memory) as layer:
            for _ in range(3):
                outputs.append(layer(tensor(case.x), tensor(case.ids), tensor(case.weights)))
    assert outputs[0].is_cuda and outputs[0].dtype == tensor(case.x).dtype
    assert error(outputs[0], case) <= LIMITS[dtype]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_weights_in_the_hidden_dtype_and_an_array_to_write_to() -> None:
    case = Case(dtype="bfloat16")
    x, ids, weights = tensor(case.x), tensor(case.ids), tensor(case.weights)
    with layer_of(case, 1.0) as layer:
        expected = layer(x, ids, weights.bfloat16().float())
        out = torch.full_like(x, torch.nan)
        assert layer(x, ids, weights.bfloat16(), out=out) is out
        assert torch.equal(out, expected)


class Lent:
    """An array of a library that knows DLPack and nothing of torch."""

    def __init__(self, values: Any) -> None:
        self._values, self.streams = values, []
        self.shape, self.dtype, self.device = values.shape, values.dtype, values.device

    def __len__(self) -> int:
        return len(self._values)

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.streams.append(stream)
        return self._values.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> Any:
        return self._values.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        class Library:
            @staticmethod
            def empty(shape: Any, *, dtype: Any, device: Any) -> Lent:
                return Lent(torch.empty(tuple(shape), dtype=dtype, device=device))

        return Library


@pytest.mark.parametrize("memory", ["1 expert", 1.0])
def test_arrays_of_other_libraries_and_their_streams(memory: Any) -> None:
    case = Case()
    arrays = [tensor(case.x), tensor(case.ids), tensor(case.weights)]
    with layer_of(case, memory) as layer:
        expected = layer(*arrays)
        lent = [Lent(array) for array in arrays]
        out = layer(*lent)
        assert isinstance(out, Lent)
        torch.cuda.synchronize()
        assert torch.equal(out._values, expected)
        assert lent[0].streams == [1]  # the legacy default stream
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for given in (stream, stream.cuda_stream):
            out = layer(*lent, stream=given)
            stream.synchronize()
            assert torch.equal(out._values, expected)
        assert lent[0].streams[1:] == [stream.cuda_stream] * 2


def test_work_in_the_order_of_the_current_stream() -> None:
    case = Case(tokens=300, hidden=256, intermediate=256)
    arrays = [tensor(case.x), tensor(case.ids), tensor(case.weights)]
    with layer_of(case, 1.0) as layer:
        expected = layer(*arrays)
        layer(*arrays)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # what comes next must wait for it
            late = arrays[0].clone()
            out = layer(late, *arrays[1:])
        stream.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("memory", ["2 experts", 1.0])
@pytest.mark.parametrize("wrong", [7, -1, 2**40, -(2**40)])
def test_ids_out_of_range_raise_at_the_latest_with_the_next_call(memory: Any, wrong: int) -> None:
    case = Case()
    x, ids, weights = tensor(case.x), tensor(case.ids), tensor(case.weights)
    with layer_of(case, memory) as layer:
        for _ in range(3):
            expected = layer(x, ids, weights)
        bad = ids.clone()
        bad[3, 1] = wrong
        with pytest.raises(IndexError, match=r"expected 0 to 5, got .* for token 3"):
            layer(x, bad, weights)
            layer.stats()
        assert torch.equal(layer(x, ids, weights), expected)
        layer.stats()


def test_places_that_do_not_fit_are_named() -> None:
    case = Case()
    x, ids, weights = tensor(case.x), tensor(case.ids), tensor(case.weights)
    with layer_of(case, 1.0) as layer:
        with pytest.raises(ValueError, match=r"top_k_index: expected an array on cuda:0.*cpu"):
            layer(x, ids.cpu(), weights)
        with pytest.raises(ValueError, match="hidden_states: expected an array on cuda:0"):
            layer(x.cpu(), ids, weights)
        with pytest.raises(TypeError, match="stream: expected None"):
            layer(x, ids, weights, stream="default")
    with (
        case.layer(1.0) as layer,
        pytest.raises(ValueError, match=r"hidden_states: expected an array in RAM.*cuda:0"),
    ):
        layer(x, ids.cpu(), weights.cpu())


def test_arrays_in_ram_for_a_gpu() -> None:
    case = Case(dtype="bfloat16", gated=True)
    x, ids, weights = tensor(case.x), tensor(case.ids), tensor(case.weights)
    with layer_of(case, 0.5) as layer, case.layer(0.5, device="cuda") as other:
        assert torch.equal(layer(x, ids, weights), other(x, ids, weights))


def test_counts_without_a_wait_are_right() -> None:
    case = Case(tokens=50)
    x, ids, weights = tensor(case.x), tensor(case.ids), tensor(case.weights)
    with layer_of(case, 1.0) as layer:
        for _ in range(100):
            layer(x, ids, weights)
        stats = layer.stats()
        assert stats["calls"] == 100 and stats["loads"] == 6
        assert stats["uses"] == 600 == stats["hits"] + stats["late"] + stats["misses"]
        assert stats["passes"] == 100 and stats["tokens"] == 5000


def test_an_empty_batch() -> None:
    case = Case()
    x, ids, weights = tensor(case.x), tensor(case.ids), tensor(case.weights)
    for memory in ("1 expert", 1.0):
        with layer_of(case, memory) as layer:
            for _ in range(2):
                assert layer(x[:0], ids[:0], weights[:0]).shape == (0, 16)
                layer(x, ids, weights)
