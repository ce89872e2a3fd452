# SPDX-License-Identifier: Apache-2.0
"""What a stack is about to read, by the arguments of its call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sida._core import batch_key


@dataclass(frozen=True)
class StackBatch:
    """What a stack is about to read."""

    key: int
    mask: Tensor
    """[B, S] uint8 on the CPU, 1 for tokens."""
    embeddings: Callable[[], Tensor]
    """Gives [B, S, D]."""


def read_batch(
    arguments: Mapping[str, Any], embed: Callable[[Tensor], Tensor]
) -> StackBatch | None:
    """Return what a stack reads, by the names of its arguments; None if there is nothing to read.

    A batch is named by its token ids and mask, or where only embeddings are given by their bytes.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    mask = arguments.get("attention_mask")
    if isinstance(embeddings, Tensor) and embeddings.dim() == 3:
        given = embeddings
        flags = token_mask(mask, given.shape[0], given.shape[1])
        data = given.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.blake2b(data + flags.numpy().tobytes(), digest_size=8)
        return StackBatch(int.from_bytes(digest.digest(), "little"), flags, lambda: given)
    if isinstance(ids, Tensor) and ids.dim() == 2:
        tokens = ids.detach().to("cpu", torch.int64).contiguous()
        flags = token_mask(mask, ids.shape[0], ids.shape[1])
        return StackBatch(batch_key(tokens, flags), flags, lambda: embed(tokens))
    return None


class ArrivingBatch:
    """A stack's token ids and mask on their way from a GPU, for which nobody waits yet."""

    def __init__(self, arguments: Mapping[str, Any], embed: Callable[[Tensor], Tensor]) -> None:
        self._embed = embed
        self._arguments = {
            name: value.detach().to("cpu", non_blocking=True)
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.dim() == 2
        }
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sent.record(torch.cuda.current_stream(arguments["input_ids"].device))

    @staticmethod
    def is_for(arguments: Mapping[str, Any]) -> bool:
        """Whether a stack reads token ids that lie on a GPU."""
        ids = arguments.get("input_ids")
        given = arguments.get("inputs_embeds")
        return given is None and isinstance(ids, Tensor) and ids.dim() == 2 and ids.is_cuda

    def read(self) -> StackBatch | None:
        """Wait for it; see `read_batch`."""
        self._sent.synchronize()
        return read_batch(self._arguments, self._embed)


def token_mask(mask: Any, rows: int, columns: int) -> Tensor:
    """Return [rows, columns] uint8: 1 for tokens.

    Args:
        mask: An attention mask; with a cache it may cover earlier tokens too. Anything but a mask
            of two dimensions says nothing of padding.
        rows: Sentences.
        columns: Tokens of a sentence in this call.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == rows:
        latest = mask[:, mask.shape[1] - columns :] if mask.shape[1] >= columns else mask
        if latest.shape[1] == columns:
            return (latest != 0).to("cpu", torch.uint8).contiguous()
    return torch.ones(rows, columns, dtype=torch.uint8)
