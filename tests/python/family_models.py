# SPDX-License-Identifier: Apache-2.0
"""Small models of the families with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from switch_models import decoder_inputs, make_batch, make_seq2seq
from torch import Tensor, nn

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralForCausalLM",
        {"intermediate_size": 48, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_experts": 7,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 8,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 7,
            "num_experts_per_tok": 3,
        },
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        {"intermediate_size": 24, "num_experts": 9, "num_experts_per_tok": 3},
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        {"intermediate_size": 48, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {"intermediate_size": 24, "num_local_experts": 7, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "head_dim": 8,
            "intermediate_size": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
}
"""By model type: the class to build, and what its config has beside BASE."""
MODELS = ["switch", *FAMILIES]
"""All families: those that follow transformers' experts interface, and Switch Transformers."""


def make_family(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode; experts weigh enough for one of them to be missed."""
    name, values = FAMILIES[family]
    kind: Any = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(kind.config_class(**{**BASE, **values, **changes}))
        for key, parameter in model.named_parameters():
            if key.endswith("_proj_bias"):
                parameter.data.normal_(std=0.5)
            elif ".experts." in key:
                parameter.data.normal_(std=2 * parameter.shape[1] ** -0.5)
            elif ".gate." in key or ".router." in key:
                parameter.data.normal_(std=0.5)
    return model.eval()


def make_model(family: str) -> Any:
    """A model of any of MODELS."""
    return make_seq2seq() if family == "switch" else make_family(family)


def make_inputs(family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a model of MODELS takes when it is called, and when it generates."""
    if family != "switch":
        return make_prompt(), make_prompt()
    return decoder_inputs(make_batch()), make_batch()


def make_prompt(seed: int = 0, sentences: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Sentences padded on the left, as `generate` wants them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (sentences, length), generator=generator)
    lengths = torch.randint(3, length + 1, (sentences, 1), generator=generator)
    mask = (torch.arange(length) >= length - lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: Any, prompt: dict[str, Any]) -> list[list[int]]:
    """Greedily chosen tokens, the prompt before them."""
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=5)
    result: list[list[int]] = tokens.tolist()
    return result


@contextmanager
def router_margins(model: nn.Module, sentences: int) -> Iterator[Tensor]:
    """The least distance, by sentence, at which a router or the logits decided.

    Between the last expert that was chosen and the first that was not, and between the two best
    tokens. Rows of beams belong to the sentence of their group.
    """
    least = torch.full((sentences,), torch.inf)

    def note(values: Tensor, chosen: int, rows: Tensor) -> None:
        best = values.detach().float().topk(chosen + 1, -1).values
        gaps = best[..., chosen - 1] - best[..., chosen]
        gaps = gaps.masked_fill(~rows.any(-1).view_as(gaps), torch.inf)  # padding is all zeros
        least.copy_(least.minimum(gaps.reshape(sentences, -1).amin(1)))

    def note_router(module: nn.Module, inputs: Any, output: Any) -> None:
        values = output if isinstance(output, tuple) else (output,)
        chosen = {v.shape[-1] for v in values if not v.is_floating_point()}
        logits = [v for v in values if v.is_floating_point() and v.shape[-1] not in chosen]
        if logits and chosen:
            note(logits[0].float().softmax(-1), min(chosen), inputs[0])

    def note_logits(module: nn.Module, inputs: Any, output: Tensor) -> None:
        note(output[:, -1:], 1, inputs[0][:, -1:])

    handles = [
        module.register_forward_hook(note_logits if name == "lm_head" else note_router)
        for name, module in model.named_modules()
        if name == "lm_head" or name.endswith((".gate", ".router"))
    ]
    try:
        yield least
    finally:
        for handle in handles:
            handle.remove()
