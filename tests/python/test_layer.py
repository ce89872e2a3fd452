# SPDX-License-Identifier: Apache-2.0
"""The experts of a MoE layer of one's own, against arithmetic in float64."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import sida

LIMITS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def dtype_of(name: str) -> Any:
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


class Case:
    """A layer's weights and one call of it, rounded to `dtype`."""

    def __init__(
        self, *, experts: int = 6, hidden: int = 16, intermediate: int = 24, tokens: int = 20,
        top_k: int = 2, gated: bool = False, biases: bool = False, activation: str = "relu",
        dtype: str = "float32", seed: int = 0, ids_dtype: str = "int64",
    ) -> None:  # fmt: skip
        random, kind = np.random.default_rng(seed), dtype_of(dtype)
        rows = 2 * intermediate if gated else intermediate
        self.up = random.normal(size=(experts, rows, hidden), scale=hidden**-0.5).astype(kind)
        self.down = random.normal(
            size=(experts, hidden, intermediate), scale=intermediate**-0.5
        ).astype(kind)
        self.up_bias = random.normal(size=(experts, rows)).astype(kind) if biases else None
        self.down_bias = random.normal(size=(experts, hidden)).astype(kind) if biases else None
        self.gated, self.activation, self.dtype = gated, activation, dtype
        self.x = random.normal(size=(tokens, hidden)).astype(kind)
        order = random.random((tokens, experts)).argsort(-1)
        self.ids = order[:, :top_k].astype(ids_dtype)
        self.weights = random.random((tokens, top_k)).astype(np.float32)

    def layer(self, memory: Any = 1.0, **options: Any) -> sida.OffloadedExperts:
        return sida.OffloadedExperts(
            self.up, self.down, gated=self.gated, activation=self.activation, memory=memory,
            up_bias=self.up_bias, down_bias=self.down_bias, **options,
        )  # fmt: skip

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The same, token by token, in float64, and the size of the terms that were added up."""
        act, out = ACTIVATIONS[self.activation], np.zeros(self.x.shape)
        size = np.zeros(self.x.shape)
        for t in range(len(self.x)):
            for e, weight in zip(self.ids[t], self.weights[t], strict=True):
                h = self.up[e].astype(np.float64) @ self.x[t].astype(np.float64)
                if self.up_bias is not None:
                    h += self.up_bias[e].astype(np.float64)
                if self.gated:
                    gate, up = np.split(h, 2)
                    h = act(gate) * up
                else:
                    h = act(h)
                y = self.down[e].astype(np.float64) @ h
                terms = np.abs(self.down[e].astype(np.float64)) @ np.abs(h)
                if self.down_bias is not None:
                    y += self.down_bias[e].astype(np.float64)
                out[t] += weight * y
                size[t] += weight * terms
        return out, size

    def check(self, y: Any) -> None:
        assert y.shape == self.x.shape and y.dtype == self.x.dtype
        expected, size = self.expected()
        distance = np.linalg.norm(y.astype(np.float64) - expected)
        # the few terms of a small layer may cancel, and rounding is relative to the terms
        scale = max(np.linalg.norm(expected), np.linalg.norm(size) if size.size < 64 else 0, 1e-30)
        assert distance <= LIMITS[self.dtype] * scale


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 9),
    hidden=st.integers(1, 40),
    intermediate=st.integers(1, 40),
    tokens=st.integers(0, 40),
    choices=st.integers(1, 4),
    gated=st.booleans(),
    biases=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(sorted(LIMITS)),
    ids_dtype=st.sampled_from(["int32", "int64"]),
    seed=st.integers(0, 2**32 - 1),
    slots=st.integers(1, 9),
)
def test_any_shape_routing_and_dtype(experts: int, choices: int, slots: int, **sizes: Any) -> None:
    case = Case(experts=experts, top_k=min(choices, experts), **sizes)
    with case.layer(f"{slots} experts") as layer, case.layer(1.0) as resident:
        y = layer(case.x, case.ids, case.weights)
        case.check(y)
        assert (resident(case.x, case.ids, case.weights) == y).all()


@pytest.mark.parametrize(("activation", "added", "slope"), [
    ("silu_clamped", 0, 1), ("swiglu_clamped", 1, 1.702),
])  # fmt: skip
@pytest.mark.parametrize("limit", [0.25, 1.5])
def test_gate_and_up_are_cut_at_a_limit(
    activation: str, added: float, slope: float, limit: float
) -> None:
    case = Case(gated=True, activation=activation)
    with case.layer(0.5, limit=limit) as layer:
        y = layer(case.x, case.ids, case.weights)
    expected = np.zeros_like(y, dtype=np.float64)
    for t, x in enumerate(case.x.astype(np.float64)):
        for e, weight in zip(case.ids[t], case.weights[t], strict=True):
            gate, up = np.split(case.up[e] @ x, 2)
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + added
            expected[t] += weight * (case.down[e] @ (gate / (1 + np.exp(-slope * gate)) * up))
    assert np.linalg.norm(y - expected) <= 1e-5 * np.linalg.norm(expected)
    with pytest.raises(ValueError, match=f"gated experts with {activation}"):
        Case(activation=activation).layer()
    with pytest.raises(ValueError, match="limit > 0, got 0"):
        case.layer(limit=0.0)


@pytest.mark.parametrize("memory", ["1 expert", 0.34, 0.5, 1.0])
@pytest.mark.parametrize("policy", ["fifo", "lru", "lfu", "lookahead", "auto"])
def test_budgets_and_policies(memory: Any, policy: str) -> None:
    case = Case()
    with case.layer(memory, policy=policy) as layer:
        outputs = [layer(case.x, case.ids, case.weights) for _ in range(3)]
    case.check(outputs[0])
    assert all((output == outputs[0]).all() for output in outputs)
    with case.layer(1.0, threads=3) as resident:
        assert (resident(case.x, case.ids, case.weights) == outputs[0]).all()


def test_torch_tensors_give_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    case = Case(gated=True, activation="silu")
    arrays = [torch.from_numpy(a) for a in (case.up, case.down)]
    parameters = [torch.nn.Parameter(a) for a in arrays]
    layer = sida.OffloadedExperts(*parameters, gated=True, activation="silu", memory=0.5)
    inputs = [torch.from_numpy(a) for a in (case.x, case.ids, case.weights)]
    y = layer(*inputs)
    assert isinstance(y, torch.Tensor) and y.dtype == torch.float32
    case.check(y.numpy())
    out = torch.full_like(y, 7)
    assert layer(*inputs, out=out) is out and torch.equal(out, y)
    half = [a.bfloat16() for a in arrays]
    with sida.OffloadedExperts(*half, gated=True, activation="silu", memory=0.5) as other:
        y = other(inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16())
        assert y.dtype == torch.bfloat16


def test_gradients_are_refused() -> None:
    torch = pytest.importorskip("torch")
    case = Case()
    x = torch.from_numpy(case.x).requires_grad_()
    with case.layer() as layer:
        with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
            layer(x, torch.from_numpy(case.ids), torch.from_numpy(case.weights))
        with torch.no_grad():
            layer(x, torch.from_numpy(case.ids), torch.from_numpy(case.weights))


def test_a_given_output_is_written() -> None:
    case = Case()
    with case.layer(0.5) as layer:
        out = np.full_like(case.x, 7)
        assert layer(case.x, case.ids, case.weights, out=out) is out
        case.check(out)
        before = out.copy()
        out.flags.writeable = False
        with pytest.raises((ValueError, BufferError), match=r"read-?only"):
            layer(case.x, case.ids, case.weights, out=out)
        assert (out == before).all()


def test_weight_zero_leaves_a_choice_out() -> None:
    case = Case()
    case.weights[:, 1] = 0
    with case.layer(0.5) as layer:
        case.check(layer(case.x, case.ids, case.weights))
        assert layer.stats()["uses"] == len(set(case.ids[:, 0]))


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_expert_ids_out_of_range(bad: int) -> None:
    case = Case()
    case.ids[7, 1] = bad
    out = np.full_like(case.x, 7)
    with case.layer(0.5) as layer:
        with pytest.raises(IndexError, match=str(bad)):
            layer(case.x, case.ids, case.weights, out=out)
        assert (out == 7).all()


def test_shapes_and_dtypes_that_do_not_fit() -> None:
    case = Case()
    with case.layer(0.5) as layer:
        for x, ids, weights in [
            (case.x[:, :5].copy(), case.ids, case.weights),
            (case.x[:5], case.ids, case.weights),
            (case.x.astype(np.float16), case.ids, case.weights),
            (case.x, case.ids.astype(np.float32), case.weights),
            (case.x, case.ids, case.weights[:, :1].copy()),
            (case.x, case.ids, case.weights.astype(np.int32)),
            (case.x.T.copy().T, case.ids, case.weights),
        ]:
            with pytest.raises(ValueError, match="expected"):
                layer(x, ids, weights)
        case.check(layer(case.x, case.ids, case.weights))
    with pytest.raises(RuntimeError, match="closed"):
        layer(case.x, case.ids, case.weights)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gated": True}, ValueError, r"up_proj of shape \[E, 2 I, H\] = \[6, 48, 16\]"),
        ({"up_proj": np.zeros((6, 24))}, ValueError, "up_proj to be an array of 3 dimensions"),
        ({"down_proj": 3}, ValueError, "down_proj to be an array of 3 dimensions, got int"),
        ({"up_bias": np.zeros((6, 3), np.float32)}, ValueError, r"up_bias of shape \[6, 24\]"),
        ({"down_bias": np.zeros((6, 3), np.float32)}, ValueError, r"down_bias of shape \[6, 16\]"),
        ({"activation": "tanh"}, ValueError, "relu"),
        ({"policy": "mru"}, ValueError, "fifo"),
        ({"memory": 0.01}, ValueError, "1 expert"),
        ({"device": "cuda:99"}, sida.CudaError, "cuda: "),
        ({"device": "tpu"}, ValueError, 'device="cpu"'),
    ],
)
def test_layers_that_cannot_be(change: dict[str, Any], error: Any, message: str) -> None:
    case = Case()
    options = {
        "up_proj": case.up, "down_proj": case.down, "gated": False, "activation": "relu",
        "memory": 0.5,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        sida.OffloadedExperts(**{**options, **change})


def test_a_stream_is_for_gpus() -> None:
    case = Case()
    with case.layer() as layer, pytest.raises(ValueError, match="stream: expected None"):
        layer(case.x, case.ids, case.weights, stream=1)


def test_statistics_and_resize(tmp_path: Path) -> None:
    case = Case(tokens=1, top_k=1)
    with case.layer("2 experts") as layer:
        for _ in range(3):
            layer(case.x, case.ids, case.weights)
        stats = layer.stats()
        assert (stats["uses"], stats["misses"], stats["hits"]) == (3, 1, 2)
        assert "experts" in str(stats) and "<table>" in stats._repr_html_()
        layer.trace(tmp_path / "trace.json")
        assert (tmp_path / "trace.json").stat().st_size > 0
        layer.reset_stats()
        assert layer.stats()["uses"] == 0
        layer.resize("3 experts")
        assert layer.stats()["slots"] == 3
        case.check(layer(case.x, case.ids, case.weights))


def test_threads_take_turns() -> None:
    cases = [Case(seed=seed) for seed in range(4)]
    wrong: list[int] = []
    with cases[0].layer("2 experts") as layer:
        for case in cases[1:]:
            case.up, case.down = cases[0].up, cases[0].down

        def work(index: int) -> None:
            case = cases[index]
            try:
                for _ in range(20):
                    case.check(layer(case.x, case.ids, case.weights))
            except AssertionError:
                wrong.append(index)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_torch_is_not_needed() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, sida
up, down = np.ones((2, 3, 4), np.float32), np.ones((2, 4, 3), np.float32)
layer = sida.OffloadedExperts(up, down, gated=False, activation="relu", memory="1 expert")
y = layer(np.ones((1, 4), np.float32), np.array([[1]]), np.ones((1, 1), np.float32))
assert (y == 12).all()
try:
    sida.offload
except ImportError as error:
    assert "pip install torch" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_example_of_a_pipeline_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    path = Path(__file__).parents[2] / "examples" / "python" / "own_moe.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    spec = importlib.util.spec_from_file_location("own_moe", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    routers, up, down = (torch.randn(2, *s) / 8 for s in ((64, 16), (16, 128, 64), (16, 64, 128)))
    batches = torch.randn(6, 32, 64)

    def dense(layer: int) -> Any:
        def experts(x: Any, ids: Any, weights: Any) -> Any:
            chosen = [
                torch.relu(x @ u.T) @ d.T for u, d in zip(up[layer], down[layer], strict=True)
            ]
            every = torch.stack(chosen, 1)
            picked = every.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
            return (picked * weights[..., None]).sum(1)

        return experts

    outputs = list(module.run(batches, routers, up, down))
    for batch, output in zip(batches, outputs, strict=True):
        expected = module.forward(batch, routers, [dense(0), dense(1)])
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-5)
    assert "'tables': 6" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("memory", ["1 expert", 0.5, 1.0])
def test_nan_weights_of_an_expert_reach_the_tokens_routed_to_it_and_no_others(
    memory: Any, dtype: str
) -> None:
    case = Case(dtype=dtype, top_k=1)
    with case.layer(memory) as layer:
        clean = np.asarray(layer(case.x, case.ids, case.weights), dtype=np.float64)
    case.up[2], case.down[2] = np.nan, np.nan
    hit = (case.ids == 2).any(axis=1)
    assert hit.any() and not hit.all()
    with case.layer(memory) as layer:
        for _ in range(2):  # the second time its slot is another's
            found = np.asarray(layer(case.x, case.ids, case.weights), dtype=np.float64)
            assert np.isnan(found[hit]).all()
            assert np.array_equal(found[~hit], clean[~hit])
