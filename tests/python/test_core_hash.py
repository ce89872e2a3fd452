# SPDX-License-Identifier: Apache-2.0
"""Hash tables and predictors from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sida import HashPredictor, HashTable
from sida._core import batch_key

DATA = Path(__file__).parents[1] / "data"


def table_of(batches: int = 2, tokens: int = 3, **changes: Any) -> HashTable:
    random = np.random.default_rng(0)
    shape = (2, batches * tokens, 4)
    values: dict[str, Any] = {
        "layers": 2,
        "candidates": 4,
        "keys": [2**64 - 1 - b for b in range(batches)],
        "offsets": [b * tokens for b in range(batches + 1)],
        "ids": random.integers(-1, 8, shape),
        "probs": random.random(shape),
        "scale": random.normal(size=shape),
    }
    return HashTable(**(values | changes))


def test_a_table_gives_back_what_was_put_in() -> None:
    table = table_of()
    assert (len(table), table.layers, table.tokens, table.candidates) == (2, 2, 6, 4)
    assert table.keys == [2**64 - 1, 2**64 - 2]
    assert table.offsets == [0, 3, 6]
    random = np.random.default_rng(0)
    assert np.array_equal(table.ids, random.integers(-1, 8, (2, 6, 4)))
    assert np.array_equal(table.probs, random.random((2, 6, 4)).astype(np.float32))
    assert table.ids.dtype == np.int32
    assert repr(table) == "HashTable(2 batches, 2 layers, 6 tokens, 4 candidates)"


def test_arrays_of_a_table_are_copies() -> None:
    table = table_of()
    table.ids[:] = 5
    assert not np.all(table.ids == 5)


def test_batches_are_found_by_key() -> None:
    table = table_of()
    second = table.find(2**64 - 2)
    assert second is not None
    assert second.keys == [2**64 - 2]
    assert np.array_equal(second.ids, table.ids[:, 3:])
    assert np.array_equal(table.slice(1).scale, table.scale[:, 3:])
    assert table.find(17) is None
    with pytest.raises(IndexError, match="from 0 to 1, got 2"):
        table.slice(2)


def test_a_saved_table_is_loaded_the_same(tmp_path: Path) -> None:
    table = table_of()
    table.save(tmp_path / "routing.safetensors")
    table.save(str(tmp_path / "again.safetensors"))
    for name in ("routing", "again"):
        loaded = HashTable.load(tmp_path / f"{name}.safetensors")
        assert (loaded.keys, loaded.offsets) == (table.keys, table.offsets)
        for field in ("ids", "probs", "scale"):
            assert np.array_equal(getattr(loaded, field), getattr(table, field))


def test_files_that_hold_no_table(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.safetensors"):
        HashTable.load(tmp_path / "none.safetensors")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises((OSError, ValueError), match="sida-hash-table"):
        HashTable.load(tmp_path / "other.safetensors")
    with pytest.raises(OSError, match="nowhere"):
        table_of().save(tmp_path / "nowhere" / "routing.safetensors")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"offsets": []}, ValueError, "offsets"),
        ({"offsets": [0, 6]}, ValueError, "offsets"),
        ({"offsets": [0, 6, 3]}, ValueError, r"shape|offsets"),
        ({"ids": np.zeros((2, 6, 3), np.int32)}, ValueError, r"ids: expected shape .*\[2, 6, 4\]"),
        ({"ids": np.zeros((6, 2, 4), np.int32)}, ValueError, r"ids: .*got \[6, 2, 4\]"),
        ({"ids": np.full((2, 6, 4), -2)}, ValueError, "-2"),
        ({"ids": np.full((2, 6, 4), 2**40)}, ValueError, str(2**40)),
        ({"ids": np.full((2, 6, 4), 1.7)}, TypeError, "ids"),
        ({"probs": np.full((2, 6, 4), 1.5)}, ValueError, r"1\.5"),
        ({"probs": np.full((2, 6, 4), np.nan)}, ValueError, "nan"),
        ({"scale": np.zeros(48)}, ValueError, "scale"),
        ({"keys": [1]}, ValueError, "keys"),
        ({"keys": [-1, 1]}, TypeError, "keys"),
        ({"layers": -2}, ValueError, "-2"),
    ],
)
def test_tables_that_cannot_be_right(changes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        table_of(**changes)


@pytest.mark.parametrize("kind", ["lstm", "causal_lstm", "transformer", "token"])
def test_predictors_say_what_torch_said(kind: str) -> None:
    predictor = HashPredictor.load(DATA / f"predictor_{kind}.safetensors")
    expected = load_file(DATA / f"predictor_{kind}_expected.safetensors")
    assert predictor.kind == kind
    assert len(predictor.heads) <= predictor.layers
    embeddings, mask = expected["embeddings"], expected["mask"]
    table = predictor.predict(embeddings, mask, key=2**63, candidates=3)
    assert table.keys == [2**63]
    assert table.candidates == min(3, predictor.experts)
    assert table.tokens == embeddings.shape[0] * embeddings.shape[1]
    for layer in range(predictor.layers):
        foretold = (table.ids[layer] >= 0).all(axis=1)
        assert np.array_equal(foretold, mask.ravel().astype(bool) & (layer in predictor.heads))
    again = predictor.predict(embeddings, mask.astype(bool), key=2**63, candidates=3)
    assert np.array_equal(again.ids, table.ids)


def test_a_mask_of_ones_is_no_mask() -> None:
    predictor = HashPredictor.load(DATA / "predictor_token.safetensors")
    x = np.random.default_rng(0).normal(size=(2, 3, predictor.embedding_size)).astype(np.float32)
    assert np.array_equal(
        predictor.predict(x).probs, predictor.predict(x, np.ones((2, 3), np.int64)).probs
    )


def test_embeddings_that_do_not_fit() -> None:
    predictor = HashPredictor.load(DATA / "predictor_token.safetensors")
    size = predictor.embedding_size
    for shape, mask in (
        ((2, 3, size + 1), None),
        ((6, size), None),
        ((2, 3, size), np.ones((2, 4), bool)),
    ):
        with pytest.raises(ValueError, match="expected"):
            predictor.predict(np.zeros(shape, np.float32), mask)
    with pytest.raises(ValueError, match="f64"):
        predictor.predict(np.zeros((2, 3, size)))
    with pytest.raises(ValueError, match="candidates"):
        predictor.predict(np.zeros((2, 3, size), np.float32), candidates=0)


def test_files_that_hold_no_predictor(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.safetensors"):
        HashPredictor.load(tmp_path / "none.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(OSError, match=r"short\.safetensors"):
        HashPredictor.load(tmp_path / "short.safetensors")


def test_keys_do_not_change_between_machines() -> None:
    ids = np.arange(6, dtype=np.int64).reshape(2, 3)
    assert batch_key(ids) == batch_key(ids.ravel().astype(np.int32))
    assert batch_key(ids) == reference_key(range(6), [1] * 6)
    assert batch_key(ids, np.array([[1, 1, 0], [1, 0, 0]])) == reference_key(
        range(6), [1, 1, 0, 1, 0, 0]
    )


def reference_key(ids: Any, mask: Any) -> int:
    def scramble(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = 0xCBF29CE484222325 ^ scramble(len(mask))
    for token, flag in zip(ids, mask, strict=True):
        word = token * 2 + flag
        key = (key ^ scramble((word + 0x9E3779B97F4A7C15) % 2**64)) * 0x100000001B3 % 2**64
    return scramble(key)


def test_a_predictor_is_loaded_for_a_device() -> None:
    path = DATA / "predictor_lstm.safetensors"
    predictor = HashPredictor.load(path, device="cpu")
    assert (predictor.device, predictor.workspace_bytes) == ("cpu", 0)
    with pytest.raises(ValueError, match='expected "cpu", "cuda" or "cuda:1", got "tpu"'):
        HashPredictor.load(path, device="tpu")
