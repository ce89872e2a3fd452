# SPDX-License-Identifier: Apache-2.0
"""What acts on all weights of a model, while its experts are offloaded and after closing."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import make_family, make_prompt
from switch_models import make_batch, make_encoder, make_seq2seq, run

import sida
from sida.memory import available_memory
from sida.torch import stand_in

MAKERS = {
    "switch": make_seq2seq,
    "mixtral": lambda: make_family("mixtral"),
    "gpt_oss": lambda: make_family("gpt_oss"),
}


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in b
    )


@pytest.mark.parametrize("memory", ["1 expert", 1.0])
def test_state_dict_has_all_experts(model: Any, memory: Any) -> None:
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    with sida.offload(model, memory=memory):
        state = model.state_dict()
        assert same(dict(sorted(state.items())), dict(sorted(expected.items())))
        name = next(name for name in expected if "experts" in name)
        state[name].zero_()  # a copy
        assert torch.equal(model.state_dict()[name], expected[name])
    assert same(model.state_dict(), expected)


def test_state_dict_of_a_loaded_model(model: Any, tmp_path: Path) -> None:
    expected = model.state_dict()
    model.save_pretrained(tmp_path)
    off = sida.from_pretrained(tmp_path, memory=0.25)
    loaded = off.model
    assert same(dict(sorted(loaded.state_dict().items())), dict(sorted(expected.items())))
    off.close()
    with pytest.raises(RuntimeError, match="closed"):
        loaded.state_dict()
    with pytest.raises(RuntimeError, match="closed"):
        loaded.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_state_dict_says_what_memory_it_would_take(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    experts = [w for name, w in model.named_parameters() if ".experts." in name]
    needed = sum(weight.nbytes for weight in experts)
    layers = 4 if "decoder" in dict(model.named_children()) else 2
    with sida.offload(model, memory=0.25):
        monkeypatch.setattr(stand_in, "available_memory", lambda: needed - 1)
        message = rf"{needed:,} bytes, but {needed - 1:,} are available; save_pretrained"
        with pytest.raises(MemoryError, match=message):
            model.state_dict()
        monkeypatch.setattr(stand_in, "available_memory", lambda: needed // layers)
        for found in stand_in.stand_ins(model).values():
            assert sum(w.nbytes for w in found.state_dict().values()) == needed // layers
        model.save_pretrained(tmp_path)  # never in memory as a whole
        monkeypatch.setattr(stand_in, "available_memory", lambda: None)
        assert len(model.state_dict()) > len(experts)


def test_loading_weights_into_offloaded_experts_is_refused(model: Any) -> None:
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    resident = {name: weight for name, weight in state.items() if ".experts." not in name}
    with sida.offload(model, memory=0.25):
        with pytest.raises(RuntimeError, match=r"experts are offloaded.*close\(\)"):
            model.load_state_dict(state)
        assert not model.load_state_dict(resident).missing_keys
    model.load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.type(torch.float16),
        lambda m: m.base_model.to(torch.bfloat16),
        lambda m: torch.nn.ModuleList([m]).half(),
    ],
)
def test_another_dtype_is_refused_and_nothing_has_changed(model: Any, change: Any) -> None:
    before = {name: weight.dtype for name, weight in model.state_dict().items()}
    with sida.offload(model, memory=0.25):
        with pytest.raises(RuntimeError, match=r"torch\.float32, .*close\(\) the handle, convert"):
            change(model)
        assert {name: weight.dtype for name, weight in model.state_dict().items()} == before
    change(model)
    assert model.dtype != torch.float32


def test_another_device_is_refused_and_nothing_has_changed(model: Any) -> None:
    with sida.offload(model, memory=0.25):
        for change in (lambda: model.to("meta"), lambda: model.to_empty(device="meta")):
            with pytest.raises(RuntimeError, match=r"computed on cpu, .* meta: close\(\).*device="):
                change()
        assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_dtype_and_device_that_the_model_has_are_fine(model: Any) -> None:
    batch = make_prompt() if "decoder" not in dict(model.named_children()) else make_batch()
    part = model if "decoder" not in dict(model.named_children()) else model.encoder
    with sida.offload(model, memory=0.25):
        expected = run(part, batch)
        for change in (model.float, model.cpu, lambda: model.to("cpu", torch.float32)):
            assert change() is model
        assert torch.equal(run(part, batch), expected)


@pytest.mark.parametrize(
    "take",
    [
        copy.deepcopy,
        pickle.dumps,
        lambda m: torch.save(m, io.BytesIO()),
        lambda m: copy.deepcopy(m.base_model),
    ],
)
def test_copies_and_pickles_are_refused(model: Any, take: Any) -> None:
    with (
        sida.offload(model, memory=0.25),
        pytest.raises(RuntimeError, match=r"neither be copied nor pickled: close\(\).*save_pretr"),
    ):
        take(model)
    take(model)


def test_training_needs_the_experts_back(model: Any) -> None:
    batch = {"input_ids": torch.arange(2, 12).view(2, 5)}
    batch["labels"] = batch["input_ids"]
    with sida.offload(model, memory=0.25):
        assert model.train().training and not model.eval().training
        with pytest.raises(RuntimeError, match=r"gradients do not flow.*torch\.no_grad"):
            model(**batch).loss.backward()
    model(**batch).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".layers.0." in name)


def test_another_experts_implementation_waits_for_closing() -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    model.set_experts_implementation("eager")
    with sida.offload(model, memory=0.25):
        expected = run(model, prompt)
        model.set_experts_implementation("batched_mm")
        assert torch.equal(run(model, prompt), expected)
        with pytest.raises(ValueError, match="is not supported"):
            model.set_experts_implementation("nonsense")
    assert model.config._experts_implementation == "batched_mm"
    torch.testing.assert_close(run(model, prompt), expected, rtol=1e-4, atol=1e-4)


def test_closing_leaves_the_model_as_it_was(model: Any, tmp_path: Path) -> None:
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: dict(m._state_dict_pre_hooks) for name, m in model.named_modules()}
    with sida.offload(model, memory=0.25):
        pass
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert {name: dict(m._state_dict_pre_hooks) for name, m in model.named_modules()} == hooks
    model.save_pretrained(tmp_path)
    assert torch.equal(
        next(copy.deepcopy(model).half().parameters()), next(model.parameters()).half()
    )


def test_available_memory(tmp_path: Path) -> None:
    real = available_memory()
    assert real is None or real > 1 << 20
    assert available_memory(tmp_path) is None
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n",
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/memory.max": "max\n",
        "sys/fs/cgroup/box/memory.current": "3000000\n",
        "sys/fs/cgroup/box/memory.stat": "anon 5\ninactive_file 500000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == 5000 * 1024
    limit = tmp_path / "sys/fs/cgroup/box/memory.max"
    for text, expected in (("4000000", 1_500_000), ("1000", 0), ("99000000", 5000 * 1024)):
        limit.write_text(text)
        assert available_memory(tmp_path) == expected


def test_an_encoder_alone() -> None:
    model = make_encoder()
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    with sida.offload(model.encoder, memory=0.25):
        assert model.state_dict().keys() == expected.keys()
        with pytest.raises(RuntimeError, match="convert the model"):
            model.encoder.half()
