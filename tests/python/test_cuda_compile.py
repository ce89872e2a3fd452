# SPDX-License-Identifier: Apache-2.0
"""Compiled models on a GPU: torch's kernels and CUDA graphs around experts that sida computes."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import make_family, make_prompt
from gpu import needs_gpu, on_gpu
from switch_models import relative, run

import sida

pytestmark = [
    needs_gpu,
    pytest.mark.usefixtures("nothing_compiled"),
    # What inductor says of the GPU, as that TF32 would be faster, and of what it makes of softmax.
    pytest.mark.filterwarnings(r"ignore::UserWarning:torch\._inductor.*"),
    # Between two of sida's operators there may be nothing for a CUDA graph to do.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

MEMORY = ["3 experts", 1.0]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("memory", MEMORY)
def test_same_numbers_call_after_call(memory: Any, mode: str | None) -> None:
    model = make_family("mixtral").to("cuda")
    prompt = on_gpu(make_prompt())
    expected = run(model, prompt)
    with sida.offload(model, memory=memory, device="cuda") as off:
        graph = torch.compile(off.model, fullgraph=True, mode=mode)
        for _ in range(4):  # the first ones warm up, then a CUDA graph is recorded, then replayed
            assert relative(run(graph, prompt).clone(), expected) <= 1e-5


@pytest.mark.parametrize("memory", MEMORY)
def test_same_tokens_from_generate_with_a_static_cache(memory: Any) -> None:
    model = make_family("qwen3_moe").to("cuda")
    prompt = on_gpu(make_prompt())
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    with sida.offload(model, memory=memory, device="cuda") as off:
        for _ in range(2):
            got = off.model.generate(
                **prompt, do_sample=False, max_new_tokens=8, cache_implementation="static"
            )
            assert torch.equal(got, expected)
        assert off.model._compiled_call is not None
        assert off.stats()["uses"] > 0


def test_experts_that_stay_are_part_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("mixtral").to("cuda")
    prompts = [on_gpu(make_prompt(seed)) for seed in range(3)]
    expected = [run(model, prompt) for prompt in prompts]
    with sida.offload(model, memory=1.0, device="cuda") as off:
        for _ in range(2):  # the first time experts are brought
            off.reset_stats()
            for prompt in prompts:
                run(off.model, prompt)
        counted = off.stats(), off._engine.scheduler.record()
        graph = torch.compile(off.model, fullgraph=True, mode="reduce-overhead")
        check_replayed(off, graph, prompts, expected, counted, monkeypatch)
        off.resize("3 experts")
        for prompt, out in zip(prompts, expected, strict=True):
            assert relative(run(graph, prompt).clone(), out) <= 1e-5
        assert off.stats()["misses"] > 0
        off.resize(1.0)
        check_replayed(off, graph, prompts, expected, counted, monkeypatch)


def check_replayed(
    off: sida.Offloaded,
    graph: Any,
    prompts: list[dict[str, Any]],
    expected: list[Any],
    counted: tuple[sida.Stats, sida.HashTable],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Passes of a graph are right and counted, and Python has no part in their experts."""
    for _ in range(3):  # warms up, is recorded, is replayed
        run(graph, prompts[0])
    off.reset_stats()
    with monkeypatch.context() as patched:
        patched.setattr(off._engine, "compute", None)
        for prompt, out in zip(prompts, expected, strict=True):
            assert relative(run(graph, prompt).clone(), out) <= 1e-5
    stats, routing = off.stats(), off._engine.scheduler.record()
    assert [stats[name] for name in COUNTS] == [counted[0][name] for name in COUNTS]
    assert list(routing.keys) == list(counted[1].keys)
    assert routing.ids.tolist() == counted[1].ids.tolist()
    assert routing.probs.tolist() == counted[1].probs.tolist()


COUNTS = ("passes", "tokens", "uses", "hits")


def test_graphs_of_layers_whose_model_breaks_between_them() -> None:
    model = make_family("mixtral").to("cuda")
    prompts = [on_gpu(make_prompt(seed)) for seed in range(2)]
    expected = [run(model, prompt) for prompt in prompts]
    with sida.offload(model, memory=1.0, device="cuda") as off:
        attention = model.model.layers[1].self_attn
        attention.forward = torch.compiler.disable(attention.forward)
        graph = torch.compile(off.model, mode="reduce-overhead")
        for _ in range(3):
            run(graph, prompts[0])
        off.reset_stats()
        for prompt, out in zip(prompts, expected, strict=True):
            assert relative(run(graph, prompt).clone(), out) <= 1e-5
        got = off.stats()
        off.reset_stats()
        for prompt in prompts:
            run(off.model, prompt)
        counted = off.stats()
        assert [got[name] for name in COUNTS] == [counted[name] for name in COUNTS]
        del attention.forward
