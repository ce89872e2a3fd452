# SPDX-License-Identifier: Apache-2.0
"""The classifier of the demonstration: an encoder, mean pooling over tokens, a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sida.cli.locate import Sentence

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask`, [B, S]."""


class Classifier:
    """Tokenizer and head of a trained classifier; the encoder is handed over with each batch.

    `classifier(encoder, batch)` gives class logits [B, classes], so that it is the function that
    `Offloaded.map` calls on each batch.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self._head = load_file(folder / "head.safetensors")

    def batches(self, sentences: Sequence[Sentence], batch_size: int) -> list[Batch]:
        """Return the sentences as the encoder takes them, in order."""
        return tokenize(self.tokenizer, [sentence.text for sentence in sentences], batch_size)

    def __call__(self, encoder: Any, batch: Batch) -> Tensor:
        """Return class logits [B, classes], float32."""
        inputs = {name: value.to(encoder.device) for name, value in batch.items()}
        hidden = encoder(**inputs).last_hidden_state.float()
        weights = inputs["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        head = {name: value.to(hidden.device) for name, value in self._head.items()}
        return F.linear(pooled, head["weight"], head["bias"])


def tokenize(tokenizer: Any, texts: Sequence[str], batch_size: int) -> list[Batch]:
    """Return texts as batches of `input_ids` and `attention_mask`, padded, in order."""
    return [
        dict(
            tokenizer(
                list(texts[begin : begin + batch_size]),
                padding=True,
                truncation=True,
                return_tensors="pt",
                return_token_type_ids=False,
            )
        )
        for begin in range(0, len(texts), batch_size)
    ]


def load_encoder(folder: Path) -> Any:
    """Return a checkpoint's model with all its experts, as transformers loads it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    chosen = getattr(transformers, names[0]) if names else transformers.AutoModel
    return chosen.from_pretrained(folder, dtype="auto").eval()


def be_quiet() -> None:
    """Have transformers show no progress bars and no warnings."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def token_count(batches: Sequence[Batch]) -> int:
    """Return the number of tokens without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)
