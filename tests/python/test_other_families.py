# SPDX-License-Identifier: Apache-2.0
"""Families that nothing in sida was written for, and which its one adapter serves all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_models import BASE, generate
from switch_models import experts_of, relative, run

import sida

SMALL: dict[str, Any] = {**BASE, "intermediate_size": 40, "moe_intermediate_size": 24}
SHARED: dict[str, Any] = {
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}
TWO_OF_FIVE: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "DeepseekV4ForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "o_groups": 2,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "swiglu_limit": 0.5,
        "pad_token_id": 0,
    },
    "Dots1ForCausalLM": {
        **SMALL,
        **SHARED,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    },
    "Ernie4_5_MoeForCausalLM": {
        **SMALL,
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    "Glm4MoeForCausalLM": {
        **SMALL,
        **SHARED,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "GraniteMoeHybridForCausalLM": {
        **SMALL,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "layer_types": ["attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "HunYuanMoEV1ForCausalLM": {**SMALL, "num_experts": 5, "moe_topk": 2, "head_dim": 8},
    "JambaForCausalLM": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "Lfm2MoeForCausalLM": {
        **SMALL,
        **TWO_OF_FIVE,
        "num_dense_layers": 0,
        "layer_types": ["conv", "full_attention"],
    },
    "MiniMaxM2ForCausalLM": {
        **SMALL,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rotary_dim": 4,
    },
    "NemotronHForCausalLM": {
        **SMALL,
        "num_hidden_layers": 4,
        "layers_block_type": ["moe", "attention", "moe", "mamba"],
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "Qwen3NextForCausalLM": {
        **SMALL,
        **TWO_OF_FIVE,
        "shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "Qwen3VLMoeForConditionalGeneration": {
        "text_config": {
            **SMALL,
            **TWO_OF_FIVE,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [],
        },
    },
}
"""By class: a small config."""


def make_other(name: str) -> Any:
    """A model in evaluation mode; experts weigh enough for one of them to be missed."""
    kind: Any = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**MODELS[name]))
        for key, parameter in model.named_parameters():
            if ".experts." in key:
                parameter.data.normal_(std=2 * parameter.shape[-1] ** -0.5)
            elif ".gate." in key or ".router." in key:
                parameter.data.normal_(std=0.5)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_offloaded_loaded_and_saved(name: str, tmp_path: Path) -> None:
    model = make_other(name)
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids}
    prompt = {**batch, "attention_mask": torch.ones_like(ids)}
    logits, tokens = run(model, batch), generate(model, prompt)
    model.save_pretrained(tmp_path / "original")
    for memory in ("1 expert", 0.25, 1.0):
        with sida.offload(model, memory=memory) as off:
            assert relative(run(model, batch), logits) <= 1e-5
            assert generate(model, prompt) == tokens
            assert off.stats()["uses"] > 0
            if memory == 0.25:
                model.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(model, batch), logits)
    for folder in ("original", "saved"):
        with sida.from_pretrained(tmp_path / folder, memory=0.25) as off:
            assert not experts_of(off.model)
            assert relative(run(off.model, batch), logits) <= 1e-5
            assert generate(off.model, prompt) == tokens
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "saved"), batch), logits)
