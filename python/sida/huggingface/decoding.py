# SPDX-License-Identifier: Apache-2.0
"""Hash tables of a decoder's passes: what is foretold goes on from what the cache has seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sida._core import HashTable
from sida.huggingface.batches import StackBatch


class AdvancingTables(Protocol):
    """Makes the hash table of a sentence's latest tokens from the states of those before."""

    state_size: int
    """Floats of a token's state."""

    def advance(
        self, key: int, embeddings: Tensor, mask: Tensor, past: Tensor
    ) -> tuple[HashTable, Tensor]:
        """Return the table of the latest tokens, and their states.

        Args:
            key: The batch's.
            embeddings: Of the latest tokens, [B, S, D].
            mask: [B, S] uint8, nonzero for tokens.
            past: [B, P, state_size] of all tokens before.

        Returns:
            The table, and [B, S, state_size] float32.
        """


class PredictorStates(DynamicLayer):  # type: ignore[misc]
    """The predictor's states of a cache's tokens, kept in the cache as one more layer.

    So they follow whatever is done to the cache, beams that are reordered and tokens that are taken
    back among it, and are gone with it. `keys` are [B, 1, tokens, state_size].
    """

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.update(states[:, None], states[:, None, :, :0])

    @property
    def states(self) -> Tensor:
        """[B, tokens, state_size]."""
        states: Tensor = self.keys[:, 0]
        return states


class DecoderTables:
    """Builds the hash table of each pass of a decoder, with a state for each sequence.

    A pass whose sequences began elsewhere (a cache of another kind than DynamicCache, or one that
    was filled before the model was offloaded) has no table.
    """

    def __init__(self, tables: AdvancingTables) -> None:
        self._tables = tables

    def build(
        self, batch: StackBatch, arguments: Mapping[str, Any]
    ) -> tuple[HashTable, Tensor] | None:
        """Return the table of a pass that is about to begin, and the states of its tokens."""
        past = self._past(arguments.get("past_key_values"), len(batch.mask))
        if past is None or batch.mask.numel() == 0:
            return None
        return self._tables.advance(batch.key, batch.embeddings(), batch.mask, past)

    def keep(self, states: Tensor, arguments: Mapping[str, Any], output: Any) -> None:
        """Put the states of a pass, which is over, into its cache."""
        cache = arguments.get("past_key_values")
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if not self._tables.state_size or not isinstance(cache, DynamicCache):
            return
        kept = _states_in(cache)
        if kept is not None and kept.get_seq_length() + states.shape[1] == cache.get_seq_length():
            kept.update(states[:, None], states[:, None, :, :0])
            return
        if kept is not None:
            cache.layers.remove(kept)
        if states.shape[1] == cache.get_seq_length():
            cache.layers.append(PredictorStates(states))

    def _past(self, cache: Any, rows: int) -> Tensor | None:
        """Return the states of the tokens in a cache; None where they are not known."""
        if not self._tables.state_size or cache is None or _is_empty(cache):
            return torch.empty(rows, 0, self._tables.state_size)
        kept = _states_in(cache)
        if kept is None or kept.get_seq_length() != cache.get_seq_length():
            return None
        return kept.states.contiguous() if len(kept.keys) == rows else None


def _is_empty(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) == 0


def _states_in(cache: Any) -> PredictorStates | None:
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, PredictorStates):
            return layer
    return None
