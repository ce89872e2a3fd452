# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/decoder_routing.py counts, on a small random decoder."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import make_family

from sida.huggingface import find_adapter
from sida.torch import Predictor
from sida.torch.architectures import make_network

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("decoder_routing")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_family("olmoe").eval()


@pytest.fixture(scope="module")
def tasks(benchmark: ModuleType) -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 40, (benchmark.TOKENS,), generator=draw) for _ in range(2)]
    return [benchmark.Task("reading", rows, benchmark.TOKENS), benchmark.Task("writing", rows, 5)]


def test_reading_and_writing_are_what_they_say(
    benchmark: ModuleType, model: Any, tasks: list[Any]
) -> None:
    reading, writing = tasks
    given = [row.tolist() for row in reading.rows]
    assert reading.run(model) == given
    written = writing.run(model)
    assert [row[:5] for row in written] == [row[:5] for row in given] and written != given
    assert writing.run(model) == written


def test_routing_that_is_foretold_costs_perplexity_and_exact_routing_none(
    benchmark: ModuleType, model: Any, tasks: list[Any]
) -> None:
    adapter = find_adapter(model)
    layers = len(adapter.layer_names)
    torch.manual_seed(0)
    network = make_network("token", 32, adapter.num_experts, layers, hidden_size=16)
    predictor = Predictor(
        "token",
        network.requires_grad_(False),
        layers=layers,
        heads=[*range(layers)],
        fingerprint=adapter.fingerprint(),
    )
    found = benchmark.perplexities(model, predictor, tasks[0].rows)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in tasks[0].rows]
    assert found["exact"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-3)
    assert abs(found["predicted"] - found["exact"]) > 2e-3


def test_a_replay_is_what_a_run_without_tables_does(
    benchmark: ModuleType, model: Any, tasks: list[Any]
) -> None:
    for share in (25, 50):
        stats, recording, _ = benchmark.offload_and_run(model, tasks[0], share, False)
        found = benchmark.alone(recording, share)
        # Without tables "auto" depends a little on which of two loads ends first.
        assert found["auto"]["hits"] == pytest.approx(benchmark.shares(stats)["hits"], abs=0.02)
        assert 0 < found["auto"]["hits"] < found["belady"]["hits"]
        for rates in found.values():
            assert rates["loads"] >= found["belady"]["loads"]
            assert rates["late"] == 0


def test_what_the_predictor_names_is_put_beside_the_passes_of_its_token(
    benchmark: ModuleType, model: Any, tasks: list[Any]
) -> None:
    _, recording, tokens = benchmark.offload_and_run(model, tasks[0], 50, False)
    layers = recording.routing.layers
    network = make_network("causal_lstm", 32, recording.experts, layers, hidden_size=16)
    predictor = Predictor(
        "causal_lstm", network, layers=layers, heads=[*range(layers)], fingerprint="none"
    )
    found = benchmark.named_by(predictor, model, tokens, 2)
    assert found.shape == (layers, recording.routing.tokens, 2)
    for row, place in ((0, 0), (0, 7), (1, 30)):
        beginning = torch.tensor(tokens[row][: place + 1])[None]
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(beginning)
        named = predictor.predict(embeddings, torch.ones_like(beginning), 2).ids[:, 0, -1]
        assert found[:, row * len(tokens[0]) + place].tolist() == named.tolist()


def test_what_is_named_beforehand_is_counted_layer_by_layer(
    benchmark: ModuleType, model: Any, tasks: list[Any]
) -> None:
    stats, recording, _ = benchmark.offload_and_run(model, tasks[0], 50, None)
    routing = recording.routing
    ids = np.asarray(routing.ids)
    found = benchmark.named_beforehand(routing, ids, stats)
    for layer, part in enumerate(found["token before"]):
        pairs = zip(ids[layer, :-1].tolist(), ids[layer, 1:].tolist(), strict=True)
        shares = [len(set(now) & set(before)) / len(now) for before, now in pairs]
        assert part == pytest.approx(np.mean(shares), abs=1e-4)
    assert found["predictor"] == [1.0] * routing.layers
    assert found["look-ahead"][0] is None
    assert all(0 < part <= 1 for part in found["look-ahead"][1:])
