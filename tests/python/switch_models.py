# SPDX-License-Identifier: Apache-2.0
"""Small Switch Transformers with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
)

import sida

EXPERTS, LAYERS = 8, 2
"""In each stack."""
MARGIN = 1e-4
"""Below it, float rounding may decide which expert or token is chosen."""


def make_config(**changes: Any) -> SwitchTransformersConfig:
    values: dict[str, Any] = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2 * LAYERS,
        "num_sparse_encoder_layers": LAYERS,
        "num_decoder_layers": 2 * LAYERS,
        "num_sparse_decoder_layers": LAYERS,
        "num_experts": EXPERTS,
        "expert_capacity": 3,
        "decoder_start_token_id": 0,
    }
    return SwitchTransformersConfig(**{**values, **changes})


def make(kind: type[Any], seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode; experts weigh enough for one of them to be missed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(make_config(**changes))
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.data.normal_(std=2 * parameter.shape[1] ** -0.5)
            elif "router" in name:
                parameter.data.normal_(std=0.5)
    return model.eval()


def make_encoder(seed: int = 0, **changes: Any) -> SwitchTransformersEncoderModel:
    return make(SwitchTransformersEncoderModel, seed, **changes)


def make_seq2seq(seed: int = 0, **changes: Any) -> SwitchTransformersForConditionalGeneration:
    return make(SwitchTransformersForConditionalGeneration, seed, **changes)


def make_model(seed: int = 0, **changes: Any) -> SwitchTransformersModel:
    return make(SwitchTransformersModel, seed, **changes)


def make_batch(seed: int = 0, sentences: int = 5, length: int = 12) -> dict[str, Tensor]:
    """Sentences of 2 to `length` tokens, padded on the right; one has the full length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (sentences, length), generator=generator)
    lengths = torch.randint(2, length + 1, (sentences, 1), generator=generator)
    if sentences:
        lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def make_batches(count: int, **sizes: int) -> list[dict[str, Tensor]]:
    return [make_batch(seed, **sizes) for seed in range(count)]


def decoder_inputs(batch: dict[str, Tensor], length: int = 6) -> dict[str, Tensor]:
    """The batch with something for a decoder to read."""
    ids = batch["input_ids"].flip(1)[:, :length].contiguous()
    return {**batch, "decoder_input_ids": ids}


def wrong_table(table: sida.HashTable) -> sida.HashTable:
    """The table with another expert in each place."""
    return sida.HashTable(
        layers=table.layers,
        candidates=table.candidates,
        keys=table.keys,
        offsets=table.offsets,
        ids=(table.ids + 1) % EXPERTS,
        probs=table.probs,
        scale=table.scale,
    )


@torch.no_grad()
def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits, or its last hidden states."""
    output = model(**batch)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def relative(values: Tensor, reference: Tensor) -> float:
    """Relative distance in L2."""
    difference = values.double() - reference.double()
    return float(difference.norm() / reference.double().norm())


def experts_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".experts." in name}


@contextmanager
def margins(model: nn.Module, sentences: int) -> Iterator[Tensor]:
    """The least distance from the first to the second of any router or of the logits, by sentence.

    Rows of beams belong to the sentence of their group.
    """
    least = torch.full((sentences,), torch.inf)

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        values = output.detach().float()
        if values.dim() == 2:  # a router that sees tokens in one row
            values = values.unflatten(0, (sentences, -1))
        if module is not getattr(model, "lm_head", None):
            values = values.softmax(-1)
        first, second = values.topk(2, -1).values.unbind(-1)
        least.copy_(least.minimum((first - second).reshape(sentences, -1).amin(1)))

    watched = [m for n, m in model.named_modules() if n.endswith(("classifier", "lm_head"))]
    handles = [module.register_forward_hook(note) for module in watched]
    try:
        yield least
    finally:
        for handle in handles:
            handle.remove()
