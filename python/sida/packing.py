# SPDX-License-Identifier: Apache-2.0
"""What is lost where a checkpoint packs its experts and fast memory does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sida.stats import size

if TYPE_CHECKING:
    from sida._core import ExpertStore

NAMES = {"fp8": "fp8 in blocks", "mxfp4": "MXFP4"}
"""Words of a store's layout, and what people call them."""


def packing_of(store: ExpertStore) -> str | None:
    """Return how the checkpoint packs its experts, if it does."""
    for word in store.layout.split(", "):
        if word in NAMES:
            return NAMES[word]
    return None


def ratio_lost(store: ExpertStore) -> float:
    """Return how many times the bytes of the checkpoint its experts take in fast memory."""
    return store.config.total_experts * store.slab_bytes / store.stored_bytes


def what_is_lost(store: ExpertStore) -> str | None:
    """Return a sentence on what dequantising costs; None where nothing is packed."""
    packing = packing_of(store)
    if packing is None:
        return None
    total = store.config.total_experts * store.slab_bytes
    return (
        f"The checkpoint has its experts in {packing}, {size(store.stored_bytes)} in all; they are "
        f"dequantised as they are read, and take {ratio_lost(store):.2f} times as much in "
        f"{store.config.dtype}, {size(total)}."
    )
