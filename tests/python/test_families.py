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
