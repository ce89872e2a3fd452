# SPDX-License-Identifier: Apache-2.0
"""The families of transformers, offloaded and loaded, against transformers' own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import MODELS, generate, make_inputs, make_model
from switch_models import experts_of, relative, run

import sida
from sida.huggingface import expert_file, find_adapter

BUDGETS = ("1 expert", 0.25, 1.0)


class Family:
    """A model, its checkpoint, and what transformers makes of a prompt."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model, self.folder = make_model(name), folder
        self.batch, self.prompt = make_inputs(name)
        self.logits = run(self.model, self.batch)
        self.tokens = generate(self.model, self.prompt)
        self.model.save_pretrained(folder)


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("memory", BUDGETS)
def test_offload(family: Family, memory: Any) -> None:
    model = family.model
    before = {name: weight.clone() for name, weight in experts_of(model).items()}
    with sida.offload(model, memory=memory) as off:
        assert relative(run(model, family.batch), family.logits) <= 1e-5
        assert generate(model, family.prompt) == family.tokens
        assert off.stats()["uses"] > 0
    after = experts_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("memory", BUDGETS)
def test_from_pretrained(family: Family, memory: Any) -> None:
    with sida.from_pretrained(family.folder, memory=memory) as off:
        assert not experts_of(off.model)
        assert relative(run(off.model, family.batch), family.logits) <= 1e-5
        assert generate(off.model, family.prompt) == family.tokens


def state(model: Any) -> tuple[dict[str, Any], list[type], list[str]]:
    """Weights, types of modules, and names of parameters."""
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    return weights, [type(module) for module in model.modules()], names


def check_same(model: Any, before: tuple[dict[str, Any], list[type], list[str]]) -> None:
    weights, types, names = state(model)
    assert (types, names, list(weights)) == (*before[1:], list(before[0]))
    assert all(torch.equal(weights[name], weight) for name, weight in before[0].items())


def test_an_error_in_a_forward_and_closing_leave_the_model_as_it_was(family: Family) -> None:
    model, before = family.model, state(family.model)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("injected")

    off = sida.offload(model, memory=0.25)
    with off:
        experts = find_adapter(model).experts(1)
        with pytest.raises(RuntimeError, match="injected"), experts.register_forward_hook(fail):
            run(model, family.batch)
        assert relative(run(model, family.batch), family.logits) <= 1e-5
        experts.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="injected"):
            run(model, family.batch)
    check_same(model, before)
    assert torch.equal(run(model, family.batch), family.logits)


def test_an_error_half_way_through_moving_leaves_the_model_as_it_was(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = family.model, state(family.model)
    each = len(find_adapter(model).parameters(0))
    write, written = expert_file.write_tensor, []

    def fail_in_the_second_layer(file: Any, weight: Any) -> None:
        written.append(weight)
        if len(written) > each:
            raise KeyboardInterrupt
        write(file, weight)

    monkeypatch.setattr(expert_file, "write_tensor", fail_in_the_second_layer)
    with pytest.raises(KeyboardInterrupt):
        sida.offload(model, memory=0.25, offload_dir=tmp_path)
    assert len(written) == each + 1
    assert not any(tmp_path.iterdir())
    check_same(model, before)
    assert torch.equal(run(model, family.batch), family.logits)
