# SPDX-License-Identifier: Apache-2.0
"""Switch-base with random weights, the encoder alone or with its decoder; batches, and accelerate.

Weights are transformers' own initial ones. A decoder that has them chooses one token for ever: its
head is the embedding, so that the last token is likest to what it left in the residual stream, and
attention, most of all to the encoder, adds the same mean to every token. So the encoder-decoder has
a head of its own, and what its decoder's attention adds is scaled down: the tokens that it chooses
then differ, and 16 of a sentence go to ten and more of a layer's experts, in the last as in the
first.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.switch_transformers import modeling_switch_transformers as modeling

BATCHES = 8
"""Different ones, in turns."""
SMALL = {"d_model": 64, "d_ff": 32, "d_kv": 16, "num_heads": 4}
"""What the shape is cut down to where only a benchmark itself is to be tried."""
DECODER_ATTENTION = 0.3
"""Of its initial weights, where they end in the residual stream."""


def make_encoder(experts: int) -> Any:
    """Return the encoder, on the GPU."""
    return _made(SwitchTransformersEncoderModel, "cuda", num_experts=experts)


def make_encoder_decoder(experts: int, device: str, **sizes: Any) -> Any:
    """Return the model with decoder and head; `sizes` as in SMALL."""
    model = _made(
        SwitchTransformersForConditionalGeneration,
        device,
        num_experts=experts,
        num_decoder_layers=12,
        num_sparse_decoder_layers=6,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        **sizes,
    )
    for module in model.decoder.modules():
        if isinstance(module, modeling.SwitchTransformersAttention):
            module.o.weight.mul_(DECODER_ATTENTION)
    return model


def _made(kind: type[Any], device: str, **changes: Any) -> Any:
    sizes = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, **changes}
    config = SwitchTransformersConfig(
        num_layers=12,
        num_sparse_encoder_layers=6,
        expert_capacity=64,
        vocab_size=32128,
        dropout_rate=0.0,
        **sizes,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def batches_of(shape: tuple[int, int], device: str = "cuda") -> list[Tensor]:
    """Return token ids as frequent as the words of a text."""
    often = 1 / torch.arange(1, 32001, device=device).float()
    return [
        torch.multinomial(often, shape[0] * shape[1], replacement=True).view(shape)
        for _ in range(BATCHES)
    ]


def shape_name(shape: tuple[int, int]) -> str:
    """Return sentences x tokens, as results name them."""
    return f"{shape[0]}x{shape[1]}"


def accelerated(model: Any, share: float, device: str = "cuda") -> Any:
    """Dispatch a copy whose experts lie in RAM, but for a share of each layer's."""
    from accelerate import dispatch_model

    model = copy.deepcopy(model)
    main: Any = 0 if device == "cuda" else device
    places: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, modeling.SwitchTransformersDenseActDense) and ".experts." in name:
            stays = int(name.rpartition("_")[2]) < share * model.config.num_experts
            places[name] = main if stays else "cpu"
            module.to(device if stays else "cpu")
    tied_too: dict[str, bool] = {"remove_duplicate": False}
    for name, _ in [*model.named_parameters(**tied_too), *model.named_buffers(**tied_too)]:
        if ".experts." not in name:
            places[name.rpartition(".")[0] or name] = main
    return dispatch_model(model, places, main_device=main, force_hooks=True)
