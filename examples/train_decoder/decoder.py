# SPDX-License-Identifier: Apache-2.0
"""The decoder: an OLMoE of transformers, its experts in training, and its windows of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import OlmoeConfig, OlmoeForCausalLM

from shared import by_expert, grouped_linear

TEXTS = Path(".data/texts")
"""Where prepare_texts.py writes, and the others read."""


def make_config(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    experts: int,
    top_k: int,
    window: int,
) -> OlmoeConfig:
    """A config whose every layer holds experts, and whose input and output share embeddings."""
    return OlmoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=2 * window,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def load_decoder(folder: Path) -> OlmoeForCausalLM:
    """The decoder in a folder, in float32, ready to run."""
    return OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def grouped_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes what ``OlmoeExperts`` does, one product for all experts."""
    top_k = top_k_index.shape[-1]
    order, ends = by_expert(top_k_index.flatten(), experts.num_experts)
    rows = grouped_linear(hidden_states[order // top_k], experts.gate_up_proj, ends)
    gate, up = rows.chunk(2, dim=-1)
    rows = grouped_linear(F.silu(gate) * up, experts.down_proj, ends)
    rows = rows * top_k_weights.flatten()[order, None]
    out = torch.zeros_like(hidden_states)
    return out.index_add(0, order // top_k, rows.to(out.dtype))


@contextmanager
def grouped_experts(model: Any) -> Iterator[None]:
    """Runs a decoder with grouped experts while the context is open.

    transformers' own grouped implementation does not mix float32 weights with bfloat16 products.
    """
    modules = [layer.mlp.experts for layer in model.model.layers]
    for module in modules:
        module.forward = partial(grouped_forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def training_batch(
    stream: Tensor, window: int, batch_size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Windows of a row of ids, and for each of their tokens the one that follows: [B, window] each.

    A function of `seed` and `step` alone.

    Raises:
        ValueError: The text is shorter than a window.
    """
    if len(stream) <= window:
        raise ValueError(f"a window of {window} needs a longer text than {len(stream)} tokens")
    generator = torch.Generator().manual_seed((seed << 32) + step)
    begins = torch.randint(len(stream) - window, (batch_size,), generator=generator)
    index = begins[:, None] + torch.arange(window + 1)
    rows = stream[index].long()
    return rows[:, :-1], rows[:, 1:]


def held_out_windows(path: Path, window: int) -> tuple[Tensor, Tensor]:
    """A whole text cut into windows [N, window], and the tokens that follow; an end is left.

    Raises:
        ValueError: The text is not longer than a window.
    """
    stream = torch.from_numpy(np.load(path).astype(np.int64))
    count = (len(stream) - 1) // window
    if count < 1:
        raise ValueError(
            f"{path}: a window of {window} needs a longer text than {len(stream)} tokens"
        )
    ids = stream[: count * window].view(count, window)
    return ids, stream[1 : count * window + 1].view(count, window)
