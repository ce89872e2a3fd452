# SPDX-License-Identifier: Apache-2.0
"""Every experts class of the installed transformers: computed by sida, or refused with a reason."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from switch_models import relative

import sida

pytestmark = pytest.mark.families

EXPERTS_CLASS = re.compile(r"^class (\w*Experts\w*)\(", re.MULTILINE)
DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.MULTILINE)
REFUSED = {
    "Inkling2Experts": "activation",
    "MuseSparkExperts": "norm",
}
"""Classes that sida does not compute, and a word of the reason."""
OUTSIDE = {
    "DbrxExperts",
    "JetMoeParallelExperts",
    "Llama4TextExperts",
    "LongcatFlashExperts",
    "Step3p7Experts",
}
"""Classes of experts that do not follow the interface: models with them are refused."""
OUTSIDE_IN_5_17 = {"AriaExperts", "AriaGroupedExpertsGemm"}
NO_ROUTED_EXPERTS = {"AriaSharedExpertsMLP", "InklingSharedExperts"}
OWN_ADAPTER = {"SwitchTransformersExperts"}
REFUSED_UPSTREAM = {"NllbMoeExperts"}
HIDDEN, EXPERTS, TOP_K = 32, 5, 2
LIMIT = 1.5
"""Small enough that families which cut gate and up at a limit do."""


def classes(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """Module and name of every class of transformers' models whose source fits."""
    folder = Path(transformers.__file__).parent / "models"
    found = []
    for file in sorted(folder.glob("*/modeling_*.py")):
        for name in pattern.findall(file.read_text(encoding="utf-8")):
            found.append((f"transformers.models.{file.parent.name}.{file.stem}", name))
    return found


def experts_classes() -> list[tuple[str, str]]:
    """Those that transformers' experts interface decorates."""
    return classes(DECORATED)


def other_experts_classes() -> list[tuple[str, str]]:
    """Those that are named like experts, and are none of the interface's."""
    interface = set(experts_classes())
    return [found for found in classes(EXPERTS_CLASS) if found not in interface]


class AnyConfig:
    """A config of a small model, whatever the family calls its fields."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "limit" in name or "alpha" in name:
            return LIMIT if "limit" in name else 1.702
        if "act" in name:
            return "relu2" if name == "mlp_hidden_act" else "silu"  # as families with that name
        if "latent" in name:
            return None
        if "intermediate" in name or "ffn" in name:
            return 24
        if "expert" in name:
            return EXPERTS
        return HIDDEN


class OneLayer(transformers.PreTrainedModel):
    """A model around the experts of one layer."""

    config_class = transformers.PretrainedConfig

    def __init__(self, experts: Any) -> None:
        super().__init__(transformers.PretrainedConfig())
        self.block = torch.nn.Module()
        self.block.experts = experts

    def forward(self, hidden: Any, ids: Any, weights: Any) -> Any:
        return self.block.experts(hidden, ids, weights)


def test_there_are_experts_classes() -> None:
    names = [name for _, name in experts_classes()]
    assert len(names) >= 40
    assert {"MixtralExperts", "GptOssExperts", "NemotronHExperts"} <= set(names)


@pytest.mark.parametrize(("module", "name"), other_experts_classes())
def test_a_class_outside_of_the_interface_is_named(module: str, name: str) -> None:
    refused = OUTSIDE | OUTSIDE_IN_5_17
    assert name in refused | NO_ROUTED_EXPERTS | OWN_ADAPTER | REFUSED_UPSTREAM
    if name not in refused:
        return
    experts = getattr(importlib.import_module(module), name)
    model = OneLayer(experts.__new__(experts))
    torch.nn.Module.__init__(model.block.experts)
    with pytest.raises(ValueError, match=f"no MoE layer that sida knows.* found .*{name}"):
        sida.offload(model, memory=0.25)


@pytest.mark.parametrize(("module", "name"), experts_classes())
def test_experts_class(module: str, name: str) -> None:
    kind = getattr(importlib.import_module(module), name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        experts = kind(AnyConfig())
        for parameter in experts.parameters():
            parameter.data.normal_(std=0.5)
        hidden = torch.randn(11, HIDDEN)
        weights, ids = torch.randn(11, EXPERTS).softmax(-1).topk(TOP_K)
    model = OneLayer(experts).eval()
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            sida.offload(model, memory=0.25)
        return
    none = torch.arange(11)[:, None] % 3 == torch.tensor([0, 1])
    some = ids.masked_fill(none, EXPERTS), weights  # as expert parallelism marks them
    with torch.no_grad():
        expected = model(hidden, ids, weights)
        # a weight of 0 says the same, and to the classes too that do not know the mark
        expected_of_some = model(hidden, ids, weights.masked_fill(none, 0))
        assert relative(expected_of_some, expected) > 1e-2
        for memory in ("1 expert", 1.0):
            with sida.offload(model, memory=memory):
                assert relative(model(hidden, ids, weights), expected) <= 1e-5
                assert relative(model(hidden, *some), expected_of_some) <= 1e-5
