# SPDX-License-Identifier: Apache-2.0
"""The classifier: a Switch encoder of transformers, mean pooling over tokens, and a linear head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

from recipe import save_in_half


class Classifier(nn.Module):
    """Class logits [B, classes] of token ids [B, S] with an attention mask [B, S]."""

    def __init__(self, encoder: nn.Module, head: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        weights = attention_mask[..., None].to(hidden.last_hidden_state.dtype)
        pooled = (hidden.last_hidden_state * weights).sum(1) / weights.sum(1).clamp_min(1)
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


def load_classifier(folder: Path) -> Classifier:
    """The classifier in a folder that `save_classifier` wrote, in float32, ready to run."""
    encoder = SwitchTransformersEncoderModel.from_pretrained(folder, dtype=torch.float32)
    weights = load_file(folder / "head.safetensors")
    head = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
    head.load_state_dict(weights)
    return Classifier(encoder, head).eval()


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Writes config.json, model.safetensors (bfloat16) and head.safetensors (float32).

    See `recipe.save_in_half`.
    """
    save_in_half(classifier.encoder, folder)
    head = {k: v.detach().cpu().contiguous() for k, v in classifier.head.state_dict().items()}
    save_file(head, folder / "head.safetensors")


def make_config(
    *, d_model: int, d_ff: int, layers: int, experts: int, heads: int, dropout: float, **extra: Any
) -> SwitchTransformersConfig:
    """A config whose every second block holds experts.

    ``expert_capacity`` lies far above every length, so that no token is ever dropped: releases of
    transformers differ in how they apply it.
    """
    return SwitchTransformersConfig(
        d_model=d_model,
        d_ff=d_ff,
        d_kv=d_model // heads,
        num_heads=heads,
        num_layers=layers,
        num_sparse_encoder_layers=layers // 2,
        num_decoder_layers=0,
        num_sparse_decoder_layers=0,
        num_experts=experts,
        expert_capacity=4096,
        router_jitter_noise=0.0,
        dropout_rate=dropout,
        pad_token_id=0,
        eos_token_id=None,
        is_encoder_decoder=False,
        use_cache=False,
        **extra,
    )
