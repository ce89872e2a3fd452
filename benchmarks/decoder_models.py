# SPDX-License-Identifier: Apache-2.0
"""Decoders of well-known shapes with random weights, and tokens and routing with some skew.

A vocabulary of 4096 keeps the model's head from hiding its layers. Tokens come as often as the
words of a text, and in bursts, as they do there. Each matrix has a gain of one but for those that
end in the residual stream: attention takes means, which hold what all tokens have in common, and at
full strength that would grow from layer to layer until all tokens went the same way; experts change
a token so much that the next router on the same input is right for most experts but not for all.
The rows of each router are scaled by exp(SKEW * n), n normal, so that some experts are chosen more
often than others.

With experts of few inner columns, on a CPU, LRU over all layers hits 52/74/91 % of the uses of
Qwen3's shape at 25/50/75 % of the experts (OLMoE's 48/72/90, Mixtral's 32/61/82), the most used
tenth of a layer's experts has 24 % of them (21, 17), and look-ahead foretells 68 % (80, 69).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 4096
SKEW = 0.2
ATTENTION, EXPERTS = 0.65, 4.0
"""Gains of the last matrices of attention and experts; embeddings deviate by 1 from 0."""
ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight")
"""How the names of routers' matrices end."""
AGAIN, REACH = 0.35, 3
"""How often a token is one of the last ones again, and how many of them are meant."""


@dataclass(frozen=True)
class Shape:
    """A family of transformers, and what of its config differs from its defaults."""

    family: str
    config: dict[str, Any]

    @property
    def layers(self) -> int:
        """Of the model, each with experts."""
        return int(self.config["num_hidden_layers"])


_QWEN3 = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_OLMOE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
SHAPES = {
    "qwen3-30b": Shape("qwen3_moe", _QWEN3),
    "mixtral": Shape("mixtral", _MIXTRAL),
    "olmoe": Shape("olmoe", _OLMOE),
}
_DEEPSEEK = {
    "num_hidden_layers": 4,
    "first_k_dense_replace": 0,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
}
FAMILIES = {
    "qwen2_moe": Shape(
        "qwen2_moe",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
        },
    ),
    "qwen3_moe": Shape("qwen3_moe", {**_QWEN3, "num_hidden_layers": 4}),
    "mixtral": Shape("mixtral", {**_MIXTRAL, "num_hidden_layers": 4}),
    "olmoe": Shape("olmoe", {**_OLMOE, "num_hidden_layers": 4}),
    "phimoe": Shape(
        "phimoe",
        {
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
        },
    ),
    "granitemoe": Shape(
        "granitemoe",
        {
            "hidden_size": 1536,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 40,
            "num_experts_per_tok": 8,
        },
    ),
    "deepseek_v2": Shape(
        "deepseek_v2",
        {
            **_DEEPSEEK,
            "hidden_size": 2048,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "q_lora_rank": None,
        },
    ),
    "deepseek_v3": Shape(
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "hidden_size": 7168,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 2,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "q_lora_rank": 1536,
        },
    ),
    "gpt_oss": Shape(
        "gpt_oss",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
}
"""A model of each family of transformers' experts interface, its layers as large as in one that
people run (a quarter of the experts of DeepSeek-V3), but few of them."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
}
"""What a shape is cut down to where only the benchmark itself is to be tried."""


def cut_down(shape: Shape) -> Shape:
    """Return a shape so small that a CPU does for it."""
    small = {key: value for key, value in SMALL.items() if key in shape.config}
    if "kv_lora_rank" in shape.config:  # whose heads all have keys and values of their own
        small["num_key_value_heads"] = small["num_attention_heads"]
    return Shape(shape.family, {**shape.config, **small})


def make_decoder(shape: Shape, device: str) -> Any:
    """Return a model of a shape, bfloat16, in eval mode, without gradients."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.family, vocab_size=VOCABULARY, **shape.config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    gains = {"o_proj": ATTENTION, "down_proj": EXPERTS}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            part = name.removesuffix(".weight").rpartition(".")[2]
            parameter.data.normal_(std=gains.get(part, 1.0) * parameter.shape[-1] ** -0.5)
    model.model.embed_tokens.weight.data.normal_()
    for name, parameter in model.named_parameters():
        if name.endswith(ROUTERS):
            parameter.data.mul_((SKEW * torch.randn(len(parameter), 1, device=device)).exp())
    return model.eval().requires_grad_(False)


def text(tokens: int, device: str) -> Tensor:
    """Return [1, tokens] ids as frequent as a text's words, some soon again; always the same."""
    torch.manual_seed(0)
    often = 1 / torch.arange(1, VOCABULARY + 1).float()
    ids = torch.multinomial(often, tokens, replacement=True)
    again, back = torch.rand(tokens) < AGAIN, torch.randint(1, REACH + 1, (tokens,))
    for at in range(REACH, tokens):
        if again[at]:
            ids[at] = ids[at - back[at]]
    return ids[None].to(device)


def half_on_host(model: Any, device: str) -> Any:
    """Return a copy that accelerate dispatched, every second layer's experts in RAM."""
    from accelerate import dispatch_model

    model = copy.deepcopy(model)
    main: Any = 0 if device == "cuda" else device
    whole = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(whole, main)
    for number, layer in enumerate(model.model.layers):
        parts = [name for name, _ in layer.named_children() if name != "mlp"]
        parts += [f"mlp.{name}" for name, _ in layer.mlp.named_children()]
        places |= {f"model.layers.{number}.{part}": main for part in parts}
        if number % 2:
            places[f"model.layers.{number}.mlp.experts"] = "cpu"
            layer.mlp.experts.to("cpu")  # else the GPU keeps them, and nothing is copied
    return dispatch_model(model, places, main_device=main, force_hooks=True)
