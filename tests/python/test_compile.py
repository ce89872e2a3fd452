# SPDX-License-Identifier: Apache-2.0
"""Compiled models whose experts are offloaded, against the same models as transformers has them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import FAMILIES, make_family, make_prompt
from switch_models import (
    decoder_inputs,
    make_batch,
    make_batches,
    make_encoder,
    make_seq2seq,
    relative,
    run,
)
from torch import Tensor
from transformers import CompileConfig

import sida
from sida.huggingface.batches import ArrivingBatch
from sida.huggingface.engine import Engine
from sida.torch import operators

pytestmark = pytest.mark.usefixtures("nothing_compiled")


def compiled(model: Any, backend: str = "aot_eager", mode: str | None = None) -> Any:
    """The model in one graph; aot_eager does all that inductor does but write kernels."""
    return torch.compile(model, fullgraph=True, backend=backend, mode=mode)


ONE_LAYER = {"num_layers": 1, "num_sparse_encoder_layers": 1}
COUNTS = ("passes", "tokens", "uses")  # what was late depends on threads


def counts(off: sida.Offloaded) -> dict[str, Any]:
    stats = off.stats()
    return {name: stats[name] for name in COUNTS}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    check(make_family(family), make_prompt(), "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
# Biases, shared experts, routing in groups; what sida adds to a graph is the same in all.
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2"])
def test_families_with_kernels(family: str) -> None:
    layers = 2 if family == "gpt_oss" else 1  # its config names each
    model = make_family(family, num_hidden_layers=layers)
    check(model, make_prompt(), "inductor", "reduce-overhead")


@pytest.mark.slow
def test_encoder_with_kernels() -> None:
    check(make_encoder(**ONE_LAYER), make_batch(), "inductor")


def check(model: Any, batch: dict[str, Tensor], backend: str, mode: str | None = None) -> None:
    """Compiled, the model answers as without sida, and sida counts what it counts in eager mode."""
    expected = run(model, batch)
    with sida.offload(model, memory="3 experts", policy="lru") as off:
        graph = compiled(model, backend, mode)
        run(graph, batch)
        counted = []
        for called in (model, graph):
            off.resize("3 experts")
            off.reset_stats()
            assert relative(run(called, batch), expected) <= 1e-5
            counted.append(counts(off))
        assert counted[0] == counted[1]


def test_encoder_and_decoder() -> None:
    model, batch = make_seq2seq(), decoder_inputs(make_batch())
    expected = run(model, batch)
    with sida.offload(model, memory="3 experts") as off:
        assert relative(run(compiled(model), batch), expected) <= 1e-5
        assert off.stats()["passes"] == 2


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    model, prompt = make_family("mixtral", num_hidden_layers=1), make_prompt()
    if not autocast:
        model.to(torch.bfloat16)
    with sida.offload(model, memory=0.25), torch.autocast("cpu", torch.bfloat16, autocast):
        expected = run(model, prompt)
        got = run(compiled(model), prompt)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert relative(got, expected) <= 5e-3


def test_batches_of_several_sizes_in_one_graph() -> None:
    model = make_family("mixtral", num_hidden_layers=1)
    prompts = [make_prompt(size, size, 4 + size) for size in (2, 3, 5)]
    expected = [run(model, prompt) for prompt in prompts]
    graph = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with sida.offload(model, memory=0.25):
        run(graph, prompts[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            assert all(
                relative(run(graph, prompt), out) <= 1e-5
                for prompt, out in zip(prompts, expected, strict=True)
            )


def test_padding_of_a_compiled_pass_is_skipped() -> None:
    model, batch = make_encoder(**ONE_LAYER), make_batch()
    with sida.offload(model, memory=0.3, skip_padding=True):
        expected = run(model, batch)
        assert torch.equal(run(compiled(model), batch), expected)


def test_predicted_routing_and_map(tmp_path: Path) -> None:
    model, batches = make_encoder(), make_batches(3)
    with sida.offload(model, memory=1.0) as off:
        for batch in batches:
            run(model, batch)
        table = off.record(tmp_path / "routing.safetensors")
    with sida.offload(model, memory=0.3, routing="predicted", predictor=table) as off:
        expected = [run(model, batch) for batch in batches]
        graph = compiled(model)
        assert all(
            torch.equal(run(graph, batch), out)
            for batch, out in zip(batches, expected, strict=True)
        )
        off.reset_stats()
        outputs = off.map(batches, lambda _, batch: run(graph, batch))
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        stats = off.stats()
        assert stats["passes"] == stats["tables"] == 3


ALIKE = ("qwen2_moe", "olmoe", "phimoe", "granitemoe", "deepseek_v2")
"""Families whose graphs are much like others'."""


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f in ALIKE)) for f in FAMILIES]
)
def test_generate_compiles_what_a_static_cache_allows(family: str) -> None:
    layers = 2 if family == "gpt_oss" else 1  # its config names each
    model, prompt = make_family(family, num_hidden_layers=layers), make_prompt()
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=6)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    with sida.offload(model, memory=0.25) as off:
        got = model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=6,
            cache_implementation="static",
            compile_config=config,
        )
        assert torch.equal(got, expected)
        assert off.stats()["passes"] == 6  # the prompt and five steps
        assert model._compiled_call is not None


def sidas_operators(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[tuple[str, bool]]]:
    """What a model answers, and sida's operators in its graph: are they kept from CUDA graphs."""
    utils = pytest.importorskip("torch._inductor.utils")
    judge = getattr(utils, "is_cudagraph_unsafe_fx_node", None)
    if judge is None:
        pytest.skip("this torch tells of no operator whether a CUDA graph may hold it")
    seen: list[tuple[str, bool]] = []

    def note(graph: Any, inputs: Any) -> Any:
        names = [(str(node.target), node) for node in graph.graph.nodes]
        seen.extend((name, judge(node)) for name, node in names if name.startswith("sida."))
        return graph.forward

    return run(torch.compile(model, fullgraph=True, backend=note), batch), seen


@pytest.mark.parametrize("memory", ["3 experts", 1.0])
def test_what_is_sidas_stays_out_of_cuda_graphs(memory: Any) -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    expected = run(model, prompt)
    with sida.offload(model, memory=memory):
        got, seen = sidas_operators(model, prompt)
        assert relative(got, expected) <= 1e-5
    names = ["begin_pass", "experts", "experts", "end_pass"]
    assert seen == [(f"sida.{name}.default", True) for name in names]


@pytest.fixture
def staying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines as they are where all experts stay on a GPU, without what a GPU does."""
    numbers = itertools.count(1)

    def end(engine: Engine) -> None:
        engine._name_batch()
        engine.scheduler.end_pass()

    monkeypatch.setattr(
        Engine, "arrange", lambda engine: setattr(engine, "arrangement", str(next(numbers)))
    )
    monkeypatch.setattr(Engine, "begin_graphs", lambda engine: None)
    monkeypatch.setattr(Engine, "load_all", lambda engine: None)
    monkeypatch.setattr(Engine, "end_graphs", end)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("staying")
def test_experts_that_stay_may_be_part_of_cuda_graphs() -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    expected = run(model, prompt)
    with sida.offload(model, memory="3 experts"):
        got, seen = sidas_operators(model, prompt)
        assert relative(got, expected) <= 1e-5
        assert seen == [
            ("sida.begin_pass.default", True),
            ("sida.staying_experts.default", False),
            ("sida.staying_experts.default", False),
            ("sida.end_pass.default", True),
        ]


@pytest.mark.usefixtures("staying")
def test_a_graph_is_for_experts_where_they_are() -> None:
    model, prompt = make_family("mixtral", num_hidden_layers=1), make_prompt()
    expected = run(model, prompt)
    with sida.offload(model, memory="3 experts") as off:
        graph = compiled(model)
        assert relative(run(graph, prompt), expected) <= 1e-5
        first = off._engine.arrangement
        off.resize("2 experts")
        with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
            run(graph, prompt)
        assert relative(run(graph, prompt), expected) <= 1e-5
        with pytest.raises(RuntimeError, match="another budget while a compiled call began"):
            operators.begin_pass(
                operators.ORDER, prompt["input_ids"], None, None, off._passes._number, 0, first
            )
        assert relative(run(graph, prompt), expected) <= 1e-5


@pytest.mark.usefixtures("staying")
def test_a_pass_that_is_named_later_is_counted_and_recorded_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of token ids on a GPU, which are not waited for."""
    model, prompts = make_family("mixtral"), [make_prompt(seed) for seed in range(2)]

    def recorded(off: sida.Offloaded, called: Any) -> tuple[Any, ...]:
        off.reset_stats()
        for prompt in prompts:
            run(called, prompt)
        table = off._engine.scheduler.record()
        return list(table.keys), table.ids.tolist(), table.probs.tolist(), counts(off)

    with sida.offload(model, memory="3 experts") as off:
        expected = recorded(off, model)
        monkeypatch.setattr(ArrivingBatch, "is_for", lambda arguments: True)
        monkeypatch.setattr(torch.cuda, "Event", Mock)
        monkeypatch.setattr(torch.cuda, "current_stream", Mock)
        assert recorded(off, compiled(model)) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("staying")
@pytest.mark.parametrize("embedded", [False, True])
def test_experts_that_stay_are_computed_within_their_pass(embedded: bool) -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    if embedded:
        prompt["inputs_embeds"] = model.get_input_embeddings()(prompt.pop("input_ids")).detach()
    expected = run(model, prompt)
    with sida.offload(model, memory="3 experts") as off:
        graph = compiled(model, "inductor")  # which puts operators into an order of its own
        run(graph, prompt)
        order = _watch(off)
        compute = off._engine.compute

        def computed(*args: Any) -> Tensor:
            order.append(None)
            return compute(*args)

        off._engine.compute = computed
        assert relative(run(graph, prompt), expected) <= 1e-5
        assert order == [True, None, None, False]


def test_a_model_is_right_before_between_and_after_handles() -> None:
    model, prompt = make_family("mixtral", num_hidden_layers=1), make_prompt()
    expected = run(model, prompt)
    graph = compiled(model)
    for memory in (1.0, 0.5):
        assert torch.equal(run(graph, prompt), expected)
        with sida.offload(model, memory=memory) as off:
            assert relative(run(graph, prompt), expected) <= 1e-5
            off.resize("2 experts")
            off.reset_stats()
            assert relative(run(graph, prompt), expected) <= 1e-5
            assert off.stats()["passes"] == 1 and off.stats()["misses"] > 0
    assert torch.equal(run(graph, prompt), expected)


def test_a_compiled_model_is_offloaded_as_it_is() -> None:
    model, prompt = make_family("olmoe", num_hidden_layers=1), make_prompt()
    expected = run(model, prompt)
    graph = compiled(model)
    with sida.offload(graph, memory=0.25) as off:
        assert off.model is graph
        assert relative(run(off.model, prompt), expected) <= 1e-5
        assert [relative(out.logits, expected) <= 1e-5 for out in off.map([prompt])] == [True]
    model.compile(fullgraph=True, backend="aot_eager")
    with sida.offload(model, memory=0.25):
        assert relative(run(model, prompt), expected) <= 1e-5


def test_passes_of_one_graph_come_in_its_order_and_none_is_left_out() -> None:
    model = make_encoder(**ONE_LAYER)
    batches = make_batches(2)
    with sida.offload(model, memory=0.3, skip_padding=True) as off:
        expected = [run(model, batch) for batch in batches]
        off.reset_stats()

        def both(first: Any, second: Any) -> tuple[Any, Any]:
            model(**batches[0])  # nobody reads it
            return model(**first).last_hidden_state, model(**second).last_hidden_state

        with torch.no_grad():
            got = compiled(both)(*batches)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert off.stats()["passes"] == 3


def test_threads_take_turns() -> None:
    model, batches = make_encoder(**ONE_LAYER), make_batches(4)
    with sida.offload(model, memory="2 experts", skip_padding=True) as off:
        expected = [run(model, batch) for batch in batches]
        graph = compiled(model)
        run(graph, batches[0])
        off.reset_stats()
        order = _watch(off)
        calls = [(graph if i % 2 else model, i % 4) for i in range(24)]
        with ThreadPoolExecutor(6) as pool:
            outputs = list(pool.map(lambda call: run(call[0], batches[call[1]]), calls))
        assert all(
            torch.equal(out, expected[i]) for out, (_, i) in zip(outputs, calls, strict=True)
        )
        assert order == [True, False] * len(calls)


def _watch(off: sida.Offloaded) -> list[bool | None]:
    """Whether a pass was begun, or else ended, in the order in which that happens."""
    scheduler = off._engine.scheduler
    seen: list[bool | None] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(scheduler, name)

        def begin_pass(self, *args: Any, **kwargs: Any) -> None:
            seen.append(True)
            scheduler.begin_pass(*args, **kwargs)

        def end_pass(self) -> None:
            seen.append(False)
            scheduler.end_pass()

    off._engine.scheduler = Watched()
    return seen


def in_another_thread(call: Callable[[], Any]) -> Any:
    """What `call` returns; fails, rather than hangs."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(60)
    assert result, "another thread waits"
    return result[0]


@pytest.mark.parametrize("place", ["in torch", "in sida"])
def test_a_pass_that_fails_keeps_nobody_waiting(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_encoder(**ONE_LAYER), make_batch()
    expected = run(model, batch)
    wrong = {**batch, "input_ids": batch["input_ids"] + 1000}
    with sida.offload(model, memory=0.3) as off, ThreadPoolExecutor(1) as pool:
        graph = compiled(model)
        assert relative(run(graph, batch), expected) <= 1e-5
        compute = off._engine.compute
        if place == "in sida":
            monkeypatch.setattr(off._engine, "compute", lambda _, *args: compute(9, *args))
        failed = pool.submit(run, graph, wrong if place == "in torch" else batch)
        # kept, with the frames in which it was raised, as its thread is
        assert isinstance(failed.exception(), IndexError)
        monkeypatch.undo()
        assert relative(in_another_thread(lambda: run(graph, batch)), expected) <= 1e-5
        assert relative(in_another_thread(lambda: run(model, batch)), expected) <= 1e-5
        assert relative(pool.submit(run, graph, batch).result(), expected) <= 1e-5


def test_a_graph_that_breaks_within_a_pass() -> None:
    model, prompt = make_family("mixtral", num_hidden_layers=1), make_prompt()
    expected = run(model, prompt)
    with sida.offload(model, memory=0.25) as off:
        layer = model.model.layers[0].self_attn
        layer.forward = torch.compiler.disable(layer.forward)
        graph = torch.compile(model, backend="aot_eager")
        assert relative(run(graph, prompt), expected) <= 1e-5
        assert off.stats()["passes"] == 1
        del layer.forward
        assert relative(in_another_thread(lambda: run(model, prompt)), expected) <= 1e-5


def test_what_a_graph_cannot_do_is_said() -> None:
    model, prompt = make_family("mixtral", num_hidden_layers=1), make_prompt()
    with sida.offload(model, memory=0.25):
        with pytest.raises(Exception, match="gradients do not flow"):
            compiled(model)(**prompt)
        for strict in (False, True):
            with torch.no_grad(), pytest.raises(Exception, match=r"torch\.export would leave"):
                torch.export.export(model, (), dict(prompt, use_cache=False), strict=strict)


def test_a_closed_handle_of_a_loaded_model_is_said(tmp_path: Path) -> None:
    make_family("mixtral", num_hidden_layers=1).save_pretrained(tmp_path)
    prompt = make_prompt()
    off = sida.from_pretrained(tmp_path, memory=0.25)
    graph = compiled(off.model)
    run(graph, prompt)
    off.close()
    with pytest.raises(RuntimeError, match="was closed"):
        run(graph, prompt)


def test_the_operators_are_what_torch_expects() -> None:
    model = make_encoder(**ONE_LAYER)
    with sida.offload(model, memory=1.0):
        layer = next(m for m in model.modules() if hasattr(m, "run_predicted"))
        hidden = torch.randn(5, 32).bfloat16()
        ids, weights = torch.randint(0, 8, (5, 1)), torch.rand(5, 1)
        torch.library.opcheck(
            operators.experts, (operators.ORDER, hidden, ids, weights, layer._number)
        )
    for operator in (
        operators.begin_pass,
        operators.end_pass,
        operators.experts,
        operators.predicted_experts,
    ):
        assert torch.Tag.cudagraph_unsafe in operator.tags
