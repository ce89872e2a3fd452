# SPDX-License-Identifier: Apache-2.0
"""MoE modules that are not from transformers, offloaded through adapters of their own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from own_modules import (
    ADAPTERS,
    EXPERTS,
    HIDDEN,
    IN_PLACE,
    LAYERS,
    TOP_K,
    BareAdapter,
    BareMoe,
    GatedMoe,
    ListAdapter,
    ListsMoe,
    Moe,
    StackAdapter,
    StackedMoe,
    make_ids,
    make_own,
)
from switch_models import relative
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import sida
from sida.huggingface import adapter as adapters
from sida.huggingface.module_adapter import ModuleExperts

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adapters are registered for one test."""
    monkeypatch.setattr(adapters, "_registered", [])
    for adapter in {*ADAPTERS.values()}:
        sida.register_adapter(adapter)
    with torch.no_grad():
        yield


def states(model: nn.Module) -> dict[str, Any]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("memory", ["1 expert", 0.25, 1.0])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_output_is_the_models_own_and_closing_restores(kind: Any, memory: Any) -> None:
    model, ids = make_own(kind), make_ids()
    expected, weights = model(ids), states(model)
    modules = [type(module) for module in model.modules()]
    with sida.offload(model, memory=memory) as off:
        assert relative(off.model(ids), expected) <= 1e-5
        assert off.stats()["passes"] == 1
        assert LAYERS * TOP_K < off.stats()["uses"] <= LAYERS * EXPERTS
        names = {"ffn", "experts", "inner", "outer", "w1", "w2", "w3"}
        assert not any(names & {*name.split(".")} for name, _ in model.named_parameters())
        assert dict(off.model.state_dict()).keys() == weights.keys()
        assert all(torch.equal(weights[name], w) for name, w in off.model.state_dict().items())
    assert [type(module) for module in model.modules()] == modules
    assert same(states(model), weights)
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_leaving_an_expert_out_would_be_seen(kind: Any) -> None:
    model, ids = make_own(kind), make_ids()
    expected = model(ids)
    for name, weight in model.named_parameters():
        if name in ("layers.1.ffn.2.fc2.weight", "layers.1.ffn.2.w2.weight"):
            weight.zero_()
        elif name in ("layers.1.experts.outer", "layers.1.outer"):
            weight[2] = 0
        elif name == "layers.1.w2.2.weight":
            weight.zero_()
    assert relative(model(ids), expected) >= 1e-2


@pytest.mark.parametrize("kind", ADAPTERS)
def test_all_experts_stay_where_they_are_unless_gate_and_up_are_apart_or_transposed(
    kind: Any, tmp_path: Path
) -> None:
    with sida.offload(make_own(kind), memory=1.0, offload_dir=tmp_path) as off:
        assert off.stats()["in_place"] == (kind in IN_PLACE)
        assert any(tmp_path.iterdir()) == (kind not in IN_PLACE)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_same_bits_at_every_budget_and_policy(kind: Any) -> None:
    model, ids = make_own(kind), make_ids()
    with sida.offload(model, memory=1.0) as off:
        expected = off.model(ids)
    for memory in ("1 expert", "7 experts", 0.5):
        for policy in ("fifo", "lru", "lfu", "auto"):
            with sida.offload(model, memory=memory, policy=policy) as off:
                assert torch.equal(off.model(ids), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, ids = make_own(GatedMoe), make_ids()
    exact = model(ids)
    own = model.to(dtype)(ids)
    with sida.offload(model, memory=0.25) as off:
        got = off.model(ids)
    assert got.dtype == dtype
    assert relative(got.float(), exact) <= 1.25 * relative(own.float(), exact) + 1e-3


def test_a_compiled_model() -> None:
    model, ids = make_own(Moe), make_ids()
    with sida.offload(model, memory=0.25) as off:
        expected = off.model(ids)
        compiled = torch.compile(off.model, fullgraph=True, backend="eager")
        assert relative(compiled(ids), expected) <= 1e-5
    torch._dynamo.reset()


def test_map_resize_and_calls_from_threads() -> None:
    model = make_own(Moe)
    batches = [make_ids(seed) for seed in range(4)]
    expected = [model(ids) for ids in batches]
    with sida.offload(model, memory="2 experts") as off:
        for got, want in zip(off.map(batches), expected, strict=True):
            assert relative(got, want) <= 1e-5
        off.resize("9 experts")
        results: dict[int, Any] = {}

        def call(place: int) -> None:
            with torch.no_grad():
                results[place] = off.model(batches[place])

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for place, want in enumerate(expected):
            assert relative(results[place], want) <= 1e-5
        assert off.stats()["resident_experts"] <= 9


def test_what_would_copy_or_convert_the_model_is_refused() -> None:
    model = make_own(Moe)
    with sida.offload(model, memory=0.25):
        with pytest.raises(RuntimeError, match=r"close\(\) the handle"):
            copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"offloaded in torch\.float32"):
            model.half()
        with pytest.raises(ValueError, match="offloaded already"):
            sida.offload(model, memory=0.5)
        with torch.enable_grad(), pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
            model(make_ids())


def test_an_error_in_a_forward_leaves_the_model_as_it_was() -> None:
    model, ids = make_own(Moe), make_ids()
    expected, weights = model(ids), states(model)
    off = sida.offload(model, memory=0.25)
    with pytest.raises(IndexError):
        model(ids + 1000)
    assert relative(model(ids), expected) <= 1e-5
    off.close()
    assert same(states(model), weights) and torch.equal(model(ids), expected)


def test_the_next_layers_router_is_asked_ahead_where_the_adapter_says_how() -> None:
    token = make_ids()[:1, :1]
    for kind, reason in ((Moe, []), (StackedMoe, [r"layers.1: ValueError: StackAdapter does not"])):
        model = make_own(kind)
        expected = model(token)
        with sida.offload(model, memory=0.5) as off:
            for _ in range(3):
                assert relative(off.model(token), expected) <= 1e-5
            guessed = off.stats()["look_ahead"]
        assert len(guessed["off"]) == (LAYERS - 1) * len(reason)
        assert all(line in guessed["off"][0] for line in reason)
        assert (guessed["uses"] > 0) == (not reason)


def test_predictors_are_refused_by_name() -> None:
    model = make_own(Moe)
    with pytest.raises(ValueError, match="no MoE layer whose routing could be foretold"):
        sida.train_predictor(model, [make_ids()], steps=1)
    with pytest.raises(ValueError, match="sida does not foretell this model's routing"):
        sida.offload(model, memory=0.25, routing="predicted", predictor="no-such-file")


def derived(base: Any = ListAdapter, **changes: Any) -> Any:
    """An adapter that answers something else."""
    methods = {
        name: (lambda self, *args, _value=value, **kwargs: _value)
        if name in ("activation", "experts_per_token", "limit", "parameter_name")
        else value
        for name, value in changes.items()
    }
    return sida.register_adapter(type("Changed", (base,), methods))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "mish"}, ValueError, r"layers\.0 \(Moe\), as Changed.*relu, relu2.*'mish'"),
        ({"activation": None}, TypeError, r"Changed\.activation\(\) to return str, got None"),
        ({"activation": "silu_clamped"}, ValueError, "expected gated experts with silu_clamped"),
        ({"experts_per_token": 6}, ValueError, r"as Changed.*top_k <= experts \(5\), got 6"),
        ({"experts_per_token": 0}, ValueError, "as Changed.*top_k > 0, got 0"),
        ({"experts_per_token": "2"}, TypeError, r"experts_per_token\(\) to return int, got '2'"),
        ({"limit": -1.0}, ValueError, "as Changed.*limit > 0, got -1"),
        ({"parameter_name": "0.fc1.weight"}, ValueError,
         r"Changed\.parameter_name\('0\.fc1\.weight'\) to be '0\.up_proj\.weight'.*got '0\.fc1"),
        ({"parameter_name": None}, ValueError, r"parameter_name\('0\.fc1\.weight'\).*got None"),
        ({"parameter_name": "up_proj"}, ValueError,
         r"parameter_name\('0\.fc1\.bias'\) to be another name than that of '0\.fc1\.weight'"),
        ({"experts_name": "experts"}, ValueError,
         r"layers\.0 \(Moe\): expected a submodule 'experts'.*found none; experts_name of Changed"),
        ({"experts_name": "router"}, ValueError, r"parameter_name\('weight'\)"),
    ],
)  # fmt: skip
def test_wrong_answers_are_named(changes: Any, error: Any, message: str) -> None:
    model = make_own(Moe)
    weights = states(model)
    if changes.get("experts_name") == "router":
        changes = {**changes, "parameter_name": "weight"}
    derived(**changes)
    with pytest.raises(error, match=message):
        sida.offload(model, memory=0.25)
    assert same(states(model), weights)


def swapped(name: str) -> str:
    """Up and down the wrong way round."""
    name = ListAdapter.parameter_name(ListAdapter.__new__(ListAdapter), name)
    other = {"up_proj": "down_proj", "down_proj": "up_proj"}
    expert, matrix, kind = name.split(".")
    return f"{expert}.{other[matrix]}.{kind}"


def test_weights_of_other_shapes_are_named() -> None:
    class Swapped(ListAdapter):
        def parameter_name(self, name: str) -> str:
            return swapped(name)

    sida.register_adapter(Swapped)
    model = make_own(Moe)
    expected = r"hidden states: expected \[27, 20\] f32, got \[27, 24\]"
    with sida.offload(model, memory=0.25), pytest.raises(ValueError, match=expected):
        model(make_ids())
    sida.register_adapter(ListAdapter)
    odd = make_own(Moe)
    odd.layers[1].ffn[3].fc1 = nn.Linear(24, 21)
    with pytest.raises(
        ValueError, match=r"layers\.1 \(Moe\): expected experts of one shape.*expert 3"
    ):
        sida.offload(odd, memory=0.25)  # fmt: skip
    fewer = make_own(Moe)
    del fewer.layers[2].ffn[4]
    with pytest.raises(ValueError, match=r"one form in all layers.*experts=4.* in layers\.2"):
        sida.offload(fewer, memory=0.25)
    normed = make_own(Moe)
    normed.layers[0].ffn[0].norm = nn.BatchNorm1d(24, affine=False)
    with pytest.raises(ValueError, match=r"found the buffer 0\.norm\.running_mean"):
        sida.offload(normed, memory=0.25)
    transposed = make_own(StackedMoe)
    for layer in transposed.layers:
        layer.experts.inner = nn.Parameter(layer.experts.inner.mT.contiguous())
    with pytest.raises(ValueError, match=r"got .*gate_up_proj \[24, 40\].*transposed\(\) says so"):
        sida.offload(transposed, memory=0.25)


def test_parameters_beside_a_router_are_named() -> None:
    model = make_own(BareMoe)
    without = {"module_class": BareMoe, "forward": sida.ModuleAdapter.forward}
    for changes, message in (
        (without, r"layers\.0 \(BareMoe\): expected Changed\.forward to say how the module runs"),
        ({"parameter_name": None}, r"parameter_name\(\) is None for all of the module's"),
        ({"parameter_name": "inner"}, r"parameter_name\('inner'\) to be.*got 'inner'"),
        ({"transposed": lambda self, module: False}, r"got .*up_proj \[24, 20\].*transposed\(\)"),
    ):
        derived(BareAdapter, **changes)
        with pytest.raises(ValueError, match=message):
            sida.offload(model, memory=0.25)
    derived(BareAdapter, transposed=lambda self, module: 1)
    with pytest.raises(TypeError, match=r"transposed\(\) to return bool, got 1"):
        sida.offload(model, memory=0.25)


def test_transposed_matrices_that_could_be_either_way_are_named() -> None:
    derived(BareAdapter)
    model = make_own(BareMoe)
    for layer in model.layers:
        layer.inner = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))
        layer.inner_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        layer.outer = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))
    with pytest.raises(ValueError, match=r"H and I to differ, got .*up_proj \[24, 24\]"):
        sida.offload(model, memory=0.25)
    derived(ListAdapter, transposed=lambda self, module: True)
    with pytest.raises(ValueError, match="that are transposed to hold all experts"):
        sida.offload(make_own(Moe), memory=0.25)


@pytest.mark.parametrize("kind", [BareMoe, ListsMoe])
def test_weights_of_parameters_beside_a_router_are_not_loaded_silently(kind: Any) -> None:
    model = make_own(kind)
    weights = states(model)
    routers = {name: weight for name, weight in weights.items() if "router" in name}
    with sida.offload(model, memory=0.25):
        assert model.load_state_dict(routers, strict=False).unexpected_keys == []
        with pytest.raises(RuntimeError, match=r"layers\.0.*its experts are offloaded"):
            model.load_state_dict(weights, strict=False)
        assert (
            dict(model.layers[1].state_dict()).keys()
            == make_own(kind).layers[1].state_dict().keys()
        )
    model.load_state_dict(weights)


def test_weights_of_other_dtypes_are_named() -> None:
    with pytest.raises(ValueError, match=r"float16 or bfloat16, got torch\.float64"):
        sida.offload(make_own(Moe).double(), memory=0.25)
    mixed = make_own(Moe)
    mixed.layers[1].half()
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32 \(layers\.0.*float16"):
        sida.offload(mixed, memory=0.25)


@pytest.mark.parametrize(
    ("rows", "ids", "error", "message"),
    [
        (lambda x: x, lambda i: i.view(3, 9, TOP_K), ValueError, "expert ids: expected .tokens"),
        (
            lambda x: x.flatten(0, 1)[:, :5].contiguous(),
            lambda i: i,
            ValueError,
            "hidden states: expected",
        ),
        (lambda x: x.flatten(0, 1), lambda i: i.float(), ValueError, "expert ids: expected"),
        (lambda x: x.flatten(0, 1), lambda i: i[:4], ValueError, "expert weights: expected"),
        (lambda x: x.flatten(0, 1), lambda i: i + EXPERTS, IndexError, "expected 0 to 4"),
    ],
)
def test_a_forward_that_passes_something_else_is_named(
    rows: Any, ids: Any, error: Any, message: str
) -> None:
    class Wrong(ListAdapter):
        def forward(self, module: Any, experts: Any, x: Any, scale: float = 1.0) -> Any:
            index, weights = module.route(x.flatten(0, 1))
            return experts(rows(x), ids(index), weights).view_as(x)

    sida.register_adapter(Wrong)
    model, batch = make_own(Moe), make_ids()
    expected = model(batch)
    with sida.offload(model, memory=0.25), pytest.raises(error, match=message):
        model(batch)
    assert torch.equal(model(batch), expected)


def test_a_module_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model around Moe"):
        sida.offload(Moe(), memory=0.25)


def test_what_is_missing_in_an_adapter_is_said_when_it_is_registered() -> None:
    with pytest.raises(TypeError, match=r"Bare: expected module_class.*got None"):
        type("Bare", (sida.ModuleAdapter,), {})
    half = type("Half", (sida.ModuleAdapter,), {"module_class": Moe})
    with pytest.raises(TypeError, match=r"Half cannot.*activation\(\), experts_per_token\(\)"):
        sida.register_adapter(half)
    with pytest.raises(TypeError, match=r"int cannot.*arrays\(\).*install\(\).*remove\(\)"):
        sida.register_adapter(int)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="expected a class"):
        sida.register_adapter(StackAdapter.__new__(StackAdapter))  # type: ignore[type-var]


def test_the_last_adapter_is_asked_first_and_unknown_models_name_all() -> None:
    model, ids = make_own(Moe), make_ids()
    derived(activation="relu")
    with sida.offload(model, memory=0.25) as off:
        relu = off.model(ids)
    sida.register_adapter(ListAdapter)  # again: it goes in front
    with sida.offload(model, memory=0.25) as off:
        assert relative(off.model(ids), model_output := make_own(Moe)(ids)) <= 1e-5
    assert relative(relu, model_output) >= 1e-2
    with pytest.raises(
        ValueError, match=r"Moe \(ListAdapter\).*experts interface.*no module.*regis"
    ):
        sida.offload(nn.Sequential(nn.Linear(3, 3)), memory=0.25)  # fmt: skip


def test_a_module_of_transformers_too_but_only_once_it_is_loaded(tmp_path: Path) -> None:
    class Block(sida.ModuleAdapter):
        module_class = MixtralSparseMoeBlock

        def activation(self, module: Any) -> str:
            return "silu"

        def experts_per_token(self, module: Any) -> int:
            return 2

    from family_models import make_family, make_prompt  # here: the file is among the quick ones

    model, batch = make_family("mixtral"), make_prompt()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    sida.register_adapter(Block)
    with sida.offload(model, memory=0.25) as off:
        assert isinstance(off.model.model.layers[0].mlp.experts, ModuleExperts)
        assert relative(off.model(**batch).logits, expected) <= 1e-5
    with sida.from_pretrained(tmp_path, memory=0.25) as off:  # by sida's own adapter
        assert not isinstance(off.model.model.layers[0].mlp.experts, ModuleExperts)
        assert relative(off.model(**batch).logits, expected) <= 1e-5


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "python" / "own_module.py"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("the same words True" in line for line in lines)
