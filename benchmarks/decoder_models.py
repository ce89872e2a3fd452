# SPDX-License-Identifier: Apache-2.0
"""Decoders of well-known shapes with random weights, and tokens and routing with some skew.

A vocabulary of 4096 keeps the model's head from hiding its layers. Tokens come as often as the
words of a text. Embeddings are large beside what a layer adds, so that routing depends on the token
and changes from layer to layer; otherwise attention, which takes means, would send all tokens the
same way. The rows of each router are scaled by exp(SKEW * n), n normal, so that some experts are
chosen more often than others. What comes of it is recorded: see `skew` in cuda_decoder.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 4096
SKEW = 0.2
WEIGHT, EMBEDDING = 0.02, 0.5
"""Standard deviations of all matrices and of the embeddings."""


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


def make_decoder(shape: Shape, device: str) -> Any:
    """Return a model of a shape, bfloat16, in eval mode, without gradients."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.family, vocab_size=VOCABULARY, **shape.config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=WEIGHT)
    model.model.embed_tokens.weight.data.normal_(std=EMBEDDING)
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight
        rows.data.mul_((SKEW * torch.randn(len(rows), 1, device=device)).exp())
    return model.eval().requires_grad_(False)


def text(tokens: int, device: str) -> Tensor:
    """Return [1, tokens] ids as frequent as the words of a text."""
    often = 1 / torch.arange(1, VOCABULARY + 1, device=device).float()
    return torch.multinomial(often, tokens, replacement=True)[None]


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
