# SPDX-License-Identifier: Apache-2.0
"""Models and versions of transformers that sida does not vouch for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from switch_models import make_encoder

import sida
from sida.huggingface import checks


def make_nllb() -> Any:
    config = transformers.NllbMoeConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=8,
    )
    return transformers.NllbMoeForConditionalGeneration(config).eval()


def test_the_installed_nllb_moe_routes_wrongly() -> None:
    """Where this fails, transformers is right again, and sida has no reason to refuse it."""
    model = make_nllb()
    (layer,) = [m for m in model.model.encoder.modules() if type(m).__name__ == "NllbMoeSparseMLP"]
    rows: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            rows[name] = rows.get(name, 0) + len(inputs[0])

        return hook

    for name, expert in layer.experts.items():
        if name.startswith("expert_"):
            expert.register_forward_pre_hook(count(name))
    with torch.no_grad():
        layer(torch.randn(1, 20, 32))
    assert rows["expert_0"] == 140 and set(rows) <= {"expert_0", "expert_1"}


def test_nllb_moe_is_refused_with_its_reason(tmp_path: Path) -> None:
    model = make_nllb()
    reason = r"NllbMoeForConditionalGeneration: NLLB-MoE .*routes wrongly.*until transformers"
    with pytest.raises(ValueError, match=reason):
        sida.offload(model, memory=0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        sida.from_pretrained(tmp_path, memory=0.5)


@pytest.mark.parametrize("version", ["5.16.1", "5.20.1", "5.24.0.dev0", "6.0.0"])
def test_an_untested_transformers_is_warned_about(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_encoder()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(checks.transformers, "__version__", version)
    with pytest.warns(RuntimeWarning, match=rf"transformers 5\.17 and 5\.23, this is {version}"):
        sida.offload(model, memory=0.5).close()
    with pytest.warns(RuntimeWarning, match="compare results") as seen:
        sida.from_pretrained(tmp_path, memory=0.5).close()
    assert seen[0].filename == __file__  # it points at the caller


@pytest.mark.parametrize("version", ["5.17.0", "5.23.0", "5.23.4"])
def test_a_tested_transformers_is_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.transformers, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sida.offload(make_encoder(), memory=0.5).close()
