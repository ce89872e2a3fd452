# SPDX-License-Identifier: Apache-2.0
"""Predictor networks: what they compute, that padding does not matter, and their files."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from sida.torch.architectures import NETWORKS, make_network, sparsemax
from sida.torch.predictor import Predictor, load_predictor

KINDS = list(NETWORKS)


def make_predictor(kind: str, **sizes: int) -> Predictor:
    torch.manual_seed(0)
    sizes = {"embedding_size": 12, "experts": 6, "heads": 2, "hidden_size": 16} | sizes
    network = make_network(kind, **sizes)
    return Predictor(kind, network, layers=4, heads=[1, 3][: sizes["heads"]], fingerprint="f00d")


def sparsemax_by_bisection(row: list[float]) -> list[float]:
    """The threshold at which the positive parts add up to 1, found by halving."""
    low, high = max(row) - 1, max(row)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(max(z - middle, 0) for z in row) > 1:
            low = middle
        else:
            high = middle
    return [max(z - high, 0) for z in row]


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    rows = torch.randn(40, 9, dtype=torch.float64) * torch.logspace(-2, 2, 40)[:, None]
    weights = sparsemax(rows, torch.ones(40, 9, dtype=torch.bool))
    expected = torch.tensor([sparsemax_by_bisection(row.tolist()) for row in rows])
    torch.testing.assert_close(weights, expected.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(40, dtype=torch.float64))


def test_sparsemax_gives_masked_entries_nothing() -> None:
    scores = torch.tensor([[5.0, 1.0, 0.5, 9.0]])
    mask = torch.tensor([[False, True, True, False]])
    weights = sparsemax(scores, mask)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.75, 0.25, 0.0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_anywhere_does_not_matter(kind: str) -> None:
    predictor = make_predictor(kind)
    sentences = [torch.randn(length, 12) for length in (5, 1, 7, 3)]
    alone = [predictor.predict(s[None], torch.ones(1, len(s)), candidates=6) for s in sentences]
    mask = torch.tensor(
        [
            [0, 0, 1, 1, 1, 1, 1, 0, 0],  # both sides
            [0, 0, 0, 0, 0, 0, 0, 0, 1],  # left
            [1, 1, 0, 1, 1, 0, 1, 1, 1],  # holes
            [1, 1, 1, 0, 0, 0, 0, 0, 0],  # right
            [0, 0, 0, 0, 0, 0, 0, 0, 0],  # nothing at all
        ]
    )
    embeddings = torch.full((5, 9, 12), torch.nan)
    for row, sentence in enumerate(sentences):
        embeddings[row, mask[row].bool()] = sentence
    together = predictor.predict(embeddings, mask, candidates=6)
    for row, single in enumerate(alone):
        for ours, theirs in zip(together, single, strict=True):
            torch.testing.assert_close(ours[:, row, mask[row].bool()], theirs[:, 0])
    assert (together.ids[:, mask == 0] == -1).all()
    assert (together.probs[:, mask == 0] == 0).all()


@pytest.mark.parametrize("kind", ["lstm", "causal_lstm", "transformer"])
def test_tokens_see_their_sentence_and_no_other(kind: str) -> None:
    predictor = make_predictor(kind)
    embeddings, mask = torch.randn(2, 5, 12), torch.ones(2, 5)
    before = predictor.predict(embeddings, mask).probs
    embeddings[0, 0] += 1.0
    after = predictor.predict(embeddings, mask).probs
    assert (before[:, 0, 4] - after[:, 0, 4]).abs().max() > 1e-6
    torch.testing.assert_close(before[:, 1], after[:, 1], atol=0, rtol=0)


def test_the_causal_kind_sees_no_later_token() -> None:
    predictor = make_predictor("causal_lstm")
    embeddings, mask = torch.randn(1, 6, 12), torch.ones(1, 6)
    before = predictor.predict(embeddings, mask).probs
    embeddings[0, 3] += 1.0
    after = predictor.predict(embeddings, mask).probs
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3], atol=0, rtol=0)
    assert ((before - after)[:, :, 3:].abs().amax((0, 1, 3)) > 1e-6).all()


def test_the_token_kind_sees_only_the_token() -> None:
    predictor = make_predictor("token")
    embeddings, mask = torch.randn(1, 5, 12), torch.ones(1, 5)
    before = predictor.predict(embeddings, mask).probs
    embeddings[0, 0] += 1.0
    after = predictor.predict(embeddings, mask).probs
    torch.testing.assert_close(before[:, :, 1:], after[:, :, 1:], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["lstm", "causal_lstm", "transformer"])
def test_the_order_of_tokens_matters_at_any_length(kind: str) -> None:
    predictor = make_predictor(kind)
    embeddings, mask = torch.randn(1, 90, 12), torch.ones(1, 90)
    forward = predictor.predict(embeddings, mask, 6)
    backward = predictor.predict(embeddings.flip(1), mask, 6)
    assert torch.isfinite(forward.probs).all()
    assert (forward.probs - backward.probs.flip(2)).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_fall_in_probability(kind: str) -> None:
    predictor = make_predictor(kind)
    table = predictor.predict(torch.randn(3, 4, 12), torch.ones(3, 4), candidates=99)
    assert table.ids.shape == (2, 3, 4, 6)
    assert (table.probs.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(table.probs.sum(-1), torch.ones(2, 3, 4))
    assert ((table.scale > 0) & (table.scale < 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_at_all(kind: str) -> None:
    predictor = make_predictor(kind)
    for shape in ((0, 4), (2, 0), (2, 3)):
        table = predictor.predict(torch.randn(*shape, 12), torch.zeros(shape))
        assert table.ids.shape == (2, *shape, 6)
        assert (table.ids == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_predictor_is_the_same(kind: str, tmp_path: Path) -> None:
    predictor = make_predictor(kind)
    predictor.save(tmp_path / "p.safetensors")
    loaded = load_predictor(tmp_path / "p.safetensors")
    assert loaded.metadata() == predictor.metadata()
    embeddings, mask = torch.randn(2, 5, 12), torch.ones(2, 5)
    for ours, theirs in zip(
        loaded.predict(embeddings, mask), predictor.predict(embeddings, mask), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_damaged_file_is_an_os_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match=r"p\.safetensors"):
        load_predictor(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(OSError, match="expected a safetensors file"):
        load_predictor(path)
    predictor = make_predictor("lstm")
    predictor.save(path)
    tensors, metadata = load_file(path), predictor.metadata()
    for change in (
        {"format": "other"},
        {"version": "2"},
        {"kind": "oracle"},
        {"experts": "7"},
        {"heads": "1,x"},
        {"heads": "1,4"},
        {"heads": "3,1"},
        {"hidden_size": "-1"},
    ):
        save_file(tensors, path, metadata | change)
        with pytest.raises(OSError, match=r"p\.safetensors"):
            load_predictor(path)
    save_file({k: v for k, v in tensors.items() if k != "routing.bias"}, path, metadata)
    with pytest.raises(OSError, match=r"routing\.bias"):
        load_predictor(path)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="'oracle'"):
        make_network("oracle", 12, 6, 2)
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        make_network("transformer", 12, 6, 2, hidden_size=12)
    with pytest.raises(ValueError, match="experts >= 1, got 0"):
        make_network("lstm", 12, 0, 2)
