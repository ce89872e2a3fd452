# SPDX-License-Identifier: Apache-2.0
"""Where a batch's hash table comes from: a predictor, or recorded routing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sida._core import HashPredictor, HashTable
from sida.huggingface.adapter import ExpertAdapter

CANDIDATES = 8
"""Experts that a predictor names for each token, at most."""


class Tables(Protocol):
    """Makes the hash table of one batch; called from the hash-building thread as well."""

    layers: frozenset[int]
    """MoE layers that are foretold."""

    def build(self, key: int, embeddings: Callable[[], Tensor], mask: Tensor) -> HashTable:
        """Return the table of one batch.

        Args:
            key: The batch's.
            embeddings: Gives its embeddings [B, S, D]; called only if needed.
            mask: [B, S] uint8, nonzero for tokens.
        """


class PredictedTables:
    """Tables made by a hash predictor."""

    def __init__(self, predictor: Any, adapter: ExpertAdapter, device: str = "cpu") -> None:
        for name, own, model in (
            ("MoE layers", predictor.layers, len(adapter.layer_names)),
            ("experts", predictor.experts, adapter.num_experts),
            ("fingerprint", predictor.fingerprint, adapter.fingerprint()),
        ):
            if own != model:
                raise ValueError(
                    f"the predictor was trained for another model: {name} {own}, but the model "
                    f"has {model}; train one with sida.train_predictor(model, batches)"
                )
        self.layers = frozenset(predictor.heads)
        if not self.layers <= set(adapter.predictable):
            raise ValueError(
                f"expected a predictor for layers among {adapter.predictable}, got one for "
                f"{sorted(self.layers)}"
            )
        if adapter.causal and not predictor.is_causal:
            raise ValueError(
                f"a predictor of kind {predictor.kind!r} foretells a token from those that follow "
                "it, which a decoder does not have yet; train one of kind lstm or token with "
                "sida.train_predictor(model, batches)"
            )
        self.state_size: int = predictor.state_size if adapter.causal else 0
        self._predictor = predictor
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._takes = torch.device(getattr(predictor, "device", "cpu"))  # arrays there, or in RAM
        self._top_k = adapter.top_k
        self._candidates = max(CANDIDATES, adapter.top_k)

    def build(self, key: int, embeddings: Callable[[], Tensor], mask: Tensor) -> HashTable:
        """Predict the table of one batch."""
        with self._beside():
            values = self._given(embeddings())
            table = self._predictor.predict(values, mask, key=key, candidates=self._candidates)
        assert isinstance(table, HashTable)
        return _of_choices(table, self._top_k)

    def advance(
        self, key: int, embeddings: Tensor, mask: Tensor, past: Tensor
    ) -> tuple[HashTable, Tensor]:
        """Predict the table of a decoder's latest tokens; see `AdvancingTables.advance`."""
        values = self._given(embeddings)
        states = torch.empty(*mask.shape, self.state_size, device=values.device)
        table = self._predictor.advance(
            values,
            mask,
            past=past,
            states=states,
            key=key,
            candidates=self._candidates,
        )
        return _of_choices(table, self._top_k), states

    def _given(self, embeddings: Tensor) -> Tensor:
        """Return embeddings as the predictor takes them."""
        is_there = embeddings.device == self._takes
        return (
            embeddings.detach().to(self._takes if is_there else "cpu", torch.float32).contiguous()
        )

    def _beside(self) -> AbstractContextManager[Any]:
        """Return a context in which work on a GPU does not wait for what the model has enqueued.

        Reading a batch has waited for its ids or its embeddings; that leaves the model's weights.
        """
        if self._device == "cpu":
            return nullcontext()
        if self._stream is None:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self._device))
            self._stream = stream
        return torch.cuda.stream(self._stream)


def _of_choices(table: HashTable, top_k: int) -> HashTable:
    """Make of probabilities of one choice, which add up to 1, those of any of a token's choices."""
    if top_k == 1:
        return table
    return HashTable(
        layers=table.layers,
        candidates=table.candidates,
        keys=table.keys,
        offsets=table.offsets,
        ids=table.ids,
        probs=np.minimum(1, top_k * table.probs),
        scale=table.scale,
    )


class RecordedTables:
    """Tables recorded in an earlier run: what a perfect predictor would give."""

    def __init__(self, table: HashTable, adapter: ExpertAdapter) -> None:
        if table.layers != len(adapter.layer_names):
            raise ValueError(
                f"the hash table was recorded from another model: it has {table.layers} MoE "
                f"layers, the model {len(adapter.layer_names)}"
            )
        highest = int(table.ids.max(initial=-1))
        if highest >= adapter.num_experts:
            raise ValueError(
                f"the hash table was recorded from another model: it names expert {highest}, the "
                f"model has {adapter.num_experts} a layer"
            )
        named = np.flatnonzero((table.ids >= 0).any(axis=(1, 2)))
        self.layers = frozenset(int(layer) for layer in named) & set(adapter.predictable)
        self._table = table

    def build(self, key: int, embeddings: Callable[[], Tensor], mask: Tensor) -> HashTable:
        """Find the table of one batch, less its padding.

        Raises:
            ValueError: This batch was not recorded.
        """
        found = self._table.find(key)
        if found is None or found.tokens != mask.numel():
            raise ValueError(
                f"the recorded hash table has no batch with these token ids and this mask (key "
                f"{key:#018x}, {mask.numel()} tokens; it has {len(self._table)} batches): pass "
                "the batches that were recorded, or record these with off.record(path)"
            )
        ids = found.ids
        ids[:, mask.flatten().numpy() == 0] = -1
        return HashTable(
            layers=found.layers,
            candidates=found.candidates,
            keys=found.keys,
            offsets=found.offsets,
            ids=ids,
            probs=found.probs,
            scale=found.scale,
        )


def open_tables(predictor: Any, adapter: ExpertAdapter, *, device: str = "cpu") -> Tables | None:
    """Return what makes tables for a model.

    Args:
        predictor: A path of a predictor or of a hash table, either of them as an object, anything
            else with HashPredictor's attributes and `predict`; None or False for none.
        adapter: The model.
        device: Where the experts are computed: a predictor that is loaded here works there, too.

    Raises:
        ValueError: It belongs to another model, or does not foretell what this one needs.
        OSError: The file is missing, or neither a predictor nor a hash table.
    """
    if predictor is None or predictor is False:
        return None
    if not adapter.predictable:
        adapter.stack()  # says why there is none
    if isinstance(predictor, str | os.PathLike):
        predictor = load(predictor, device)
    if isinstance(predictor, HashTable):
        if adapter.causal:
            raise ValueError(
                "recorded routing foretells an encoder's batches; which tokens a decoder comes to "
                "is not known before: pass a predictor from sida.train_predictor(model, batches)"
            )
        return RecordedTables(predictor, adapter)
    if hasattr(predictor, "network") and hasattr(predictor, "save"):  # sida.torch.Predictor
        with tempfile.TemporaryDirectory(prefix="sida-predictor-") as folder:
            path = Path(folder) / "predictor.safetensors"
            predictor.save(path)
            predictor = HashPredictor.load(path, device=device)
    expected = ["predict", "layers", "heads", "experts", "fingerprint"]
    if adapter.causal:
        expected += ["kind", "is_causal", "state_size", "advance"]
    missing = [name for name in expected if not hasattr(predictor, name)]
    if missing:
        raise TypeError(
            "expected predictor to be a path, a predictor or a HashTable, got "
            f"{type(predictor).__name__} (without {', '.join(missing)})"
        )
    return PredictedTables(predictor, adapter, device)


def load(path: str | os.PathLike[str], device: str = "cpu") -> HashPredictor | HashTable:
    """Load a predictor's or a hash table's file, whichever it is; a predictor for a device."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"expected a file of a predictor or a hash table, found none at {os.fspath(path)}"
        )
    if _format(Path(path)) == "sida-hash-table":
        return HashTable.load(path)
    return HashPredictor.load(path, device=device)


def _format(path: Path) -> str | None:
    """What a safetensors file says it is; None where it is not readable."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    found = metadata.get("format") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None
