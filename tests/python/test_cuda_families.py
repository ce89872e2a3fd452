# SPDX-License-Identifier: Apache-2.0
"""The families of transformers on a GPU, against transformers' own output there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import MODELS, generate, make_inputs, make_model, router_margins
from gpu import needs_gpu, on_gpu
from own_modules import ADAPTERS, make_ids, make_own
from safetensors.torch import load_file
from switch_models import experts_of, margins, relative, run
from test_generate import WAYS, same_where_sure
from test_generate import tokens as tokens_of
from test_other_families import make_other
from test_packed_checkpoints import deepseek, gpt_oss

import sida
from sida.huggingface import adapter

pytestmark = needs_gpu


@pytest.mark.parametrize("family", MODELS)
def test_offload_and_from_pretrained(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    model = model.to("cuda")
    batch, prompt = (on_gpu(inputs) for inputs in make_inputs(family))
    expected, tokens = run(model, batch), generate(model, prompt)
    before = {name: weight.clone() for name, weight in experts_of(model).items()}
    for memory in ("1 expert", 0.25, 1.0):
        with sida.offload(model, memory=memory, device="cuda") as off:
            assert relative(run(off.model, batch), expected) <= 1e-5
            assert generate(off.model, prompt) == tokens
            assert off.stats()["uses"] > 0
    after = experts_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    for memory in ("1 expert", 0.25, 1.0):
        with sida.from_pretrained(tmp_path, memory=memory, device="cuda") as off:
            assert relative(run(off.model, batch), expected) <= 1e-5
            assert generate(off.model, prompt) == tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MODELS)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = make_model(family).to("cuda", dtype)
    batch, prompt = (on_gpu(inputs) for inputs in make_inputs(family))
    expected = run(model, batch).float().flatten(0, -2)
    outputs, tokens = [], []
    for memory in ("1 expert", 0.25, 1.0):
        with sida.offload(model, memory=memory, device="cuda") as off:
            outputs.append(run(off.model, batch))
            tokens.append(generate(off.model, prompt))
    assert all(output.dtype == dtype for output in outputs)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert all(chosen == tokens[0] for chosen in tokens)
    # A few tokens may have other experts, where rounding decides; padding comes out as zeros.
    got = outputs[0].float().flatten(0, -2)
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.nanmedian() <= 0.02


@pytest.mark.parametrize("make", [deepseek, gpt_oss])
def test_packed_checkpoints(make: Any, tmp_path: Path) -> None:
    packed = make(tmp_path / "packed")
    prompt = on_gpu(packed.prompt)
    expected = run(packed.model.to("cuda"), prompt)
    for memory in ("1 expert", 0.25, 1.0):
        with sida.from_pretrained(
            packed.folder, memory=memory, dtype=torch.float32, device="cuda"
        ) as off:
            assert relative(run(off.model, prompt), expected) <= 1e-5
            assert generate(off.model, prompt) == packed.tokens


@pytest.mark.parametrize("way", ["sampling", "beams", "static cache"])
@pytest.mark.parametrize("family", ["switch", "qwen3_moe", "gpt_oss"])
def test_ways_to_generate(family: str, way: str) -> None:
    model: Any = make_model(family).to("cuda")
    prompt, options = on_gpu(make_inputs(family)[1]), WAYS[way]
    watch = margins if model.config.is_encoder_decoder else router_margins
    with watch(model, len(prompt["input_ids"])) as least:
        expected = tokens_of(model, prompt, **options)
    for memory in (0.25, 1.0):
        with sida.offload(model, memory=memory, device="cuda"):
            same_where_sure(tokens_of(model, prompt, **options).cpu(), expected.cpu(), least.cpu())


@pytest.mark.parametrize("predictor_on", ["cpu", "cuda"])
def test_a_decoders_predictor_and_its_states(predictor_on: str, tmp_path: Path) -> None:
    model, prompt = make_model("qwen3_moe"), on_gpu(make_inputs("qwen3_moe")[1])
    path = tmp_path / "predictor.safetensors"
    sida.train_predictor(model, [make_inputs("qwen3_moe")[0]] * 3, kind="lstm", steps=5).save(path)
    model = model.to("cuda")
    expected = {way: tokens_of(model, prompt, **WAYS[way]) for way in ("beams", "sampling")}
    own = sida.HashPredictor.load(path, device=predictor_on)
    with sida.offload(model, memory=0.25, device="cuda", predictor=own) as off:
        for way, wanted in expected.items():
            assert torch.equal(tokens_of(model, prompt, **WAYS[way]), wanted)
        assert off.stats()["tables"] == off.stats()["passes"] > 0


@pytest.mark.parametrize("name", ["NemotronHForCausalLM", "DeepseekV4ForCausalLM"])
def test_activations_of_other_families(name: str) -> None:
    model = make_other(name).to("cuda")
    batch = {"input_ids": torch.arange(14, device="cuda").view(2, 7) + 2}
    expected = run(model, batch)
    for memory in ("1 expert", 1.0):
        with sida.offload(model, memory=memory, device="cuda") as off:
            assert relative(run(off.model, batch), expected) <= 1e-5


def test_choices_that_are_marked_as_none_are_left_out() -> None:
    model = make_model("qwen3_moe").to("cuda")
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    count, hidden_size = experts.gate_up_proj.shape[0], experts.gate_up_proj.shape[2]
    place = next(name for name, module in model.named_modules() if module is experts)
    hidden = torch.randn(11, hidden_size, device="cuda")
    weights, ids = torch.rand(11, count, device="cuda").topk(2)
    none = torch.arange(11, device="cuda")[:, None] % 3 == torch.tensor([0, 1], device="cuda")
    with torch.no_grad():
        expected = experts(hidden, ids, weights.masked_fill(none, 0))
        for memory in ("1 expert", 1.0):
            with sida.offload(model, memory=memory, device="cuda") as off:
                out = off.model.get_submodule(place)(hidden, ids.masked_fill(none, count), weights)
                assert relative(out, expected) <= 1e-5
                assert off.stats()["uses"] == len(ids.masked_select(~none).unique())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_modules_of_ones_own(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_registered", [ADAPTERS[kind]])
    model, ids = make_own(kind).to("cuda"), make_ids().to("cuda")
    with torch.no_grad():
        expected = model(ids)
        for memory in ("1 expert", 0.25, 1.0):
            with sida.offload(model, memory=memory, device="cuda") as off:
                assert relative(off.model(ids), expected) <= 1e-5
        assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("family", ["switch", "mixtral", "granitemoe", "gpt_oss"])
def test_saving_what_is_pinned(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / "original")
    state = model.state_dict()
    expected = load_file(tmp_path / "original" / "model.safetensors")
    with sida.offload(model, memory=0.25, device="cuda"):
        model.save_pretrained(tmp_path / "streamed")
        copied = model.state_dict()
        with pytest.raises(RuntimeError, match=r"computed on cuda:0, .* cpu: close\(\)"):
            model.to("cpu")
    saved = load_file(tmp_path / "streamed" / "model.safetensors")
    assert saved.keys() == expected.keys() and copied.keys() == state.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())
    assert all(torch.equal(copied[name].cpu(), state[name].cpu()) for name in experts_of(model))
