# SPDX-License-Identifier: Apache-2.0
"""Training and measuring predictors on a model whose routing is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tiny_moe import TinyAdapter, make_batches, make_tiny

from sida.torch.predictor import Candidates, Predictor
from sida.torch.teacher import record_routing
from sida.torch.train import fit_predictor, predictor_loss


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fit(adapter: TinyAdapter, batches: Any, kind: str = "token", **options: Any) -> Predictor:
    options = {"steps": 5, "hidden_size": 32, "progress": False} | options
    return fit_predictor(adapter, batches, kind, **options)


def mean(values: list[Any]) -> Any:
    return sum(values) / len(values)


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    return model.model(**batch)


def test_a_record_is_what_the_routers_said() -> None:
    adapter = make_tiny(top_k=2)
    adapter.model.train()
    batch = make_batches(count=1)[0]
    record = record_routing(adapter, batch, top=3)
    assert adapter.model.training and adapter.model.dropout.training
    adapter.model.eval()
    mask = batch["attention_mask"].bool()
    hidden = adapter.model.embedding(batch["input_ids"])
    torch.testing.assert_close(record.embeddings, hidden)
    for i, layer in enumerate(adapter.model.layers):
        counts = mask.cumsum(1).clamp_min(1)[..., None]
        mixed = hidden + (hidden * mask[..., None]).cumsum(1) / counts
        logits = (mixed @ layer.router.gate.weight.T)[mask]
        best = logits.softmax(-1).topk(2, -1)
        assert torch.equal(record.experts[i], best.indices)
        torch.testing.assert_close(record.weights[i], best.values)
        torch.testing.assert_close(record.top_logits[i], logits.topk(3, -1).values)
        hidden = hidden + layer(mixed)


def test_a_record_needs_every_router_to_run() -> None:
    adapter = make_tiny()
    adapter.routers = lambda: [torch.nn.Identity(), torch.nn.Identity()]  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"the router of layers\.0 did not run"):
        record_routing(adapter, make_batches(count=1)[0])


@pytest.mark.parametrize("kind", ["lstm", "causal_lstm", "transformer", "token"])
def test_training_learns_the_routing(kind: str) -> None:
    adapter = make_tiny()
    batches = make_batches(count=16)
    predictor = fit(adapter, batches, kind, steps=150, learning_rate=3e-3)
    scores = predictor.evaluate(adapter, make_batches(seed=9, count=4), logits_of)
    untrained = fit(adapter, batches, kind, steps=1)
    chance = untrained.evaluate(adapter, make_batches(seed=9, count=4), logits_of)
    assert max(chance["top1"]) < 0.4
    # Context decides too, so looking at tokens alone cannot be as good.
    least = {"lstm": 0.7, "causal_lstm": 0.5, "transformer": 0.75, "token": 0.45}[kind]
    assert scores["top1"][0] > least
    assert scores["scale_error"][0] < chance["scale_error"][0]
    assert scores["fidelity"] > chance["fidelity"]


def test_scores_are_those_worked_out_by_hand() -> None:
    adapter = make_tiny(layers=1, experts=4)
    predictor = fit(adapter, make_batches(), steps=1)
    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 0], [0, 0, 6, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]),
    }
    record = record_routing(adapter, batch)
    experts = record.experts[0, :, 0]
    wrong = (experts + 1) % 4
    first = torch.where(torch.tensor([True, False, True, False, False]), experts, wrong)
    second = torch.where(torch.tensor([True, True, True, False, True]), experts, wrong)
    ids = torch.stack([first, (experts + 2) % 4, second], -1)
    mask = batch["attention_mask"].bool()
    table = torch.full((1, 2, 4, 3), -1)
    table[0, mask] = ids
    predictor.predict = lambda *_: Candidates(table, table.float(), table.float())  # type: ignore[method-assign]
    scores = predictor.evaluate(adapter, [batch], logits_of)
    needed, named1 = set(experts.tolist()), set(first.tolist())
    named3 = set(ids.flatten().tolist())
    assert scores["top1"] == [2 / 5]
    assert scores["top3"] == [4 / 5]
    assert scores["coverage1"] == [len(needed & named1) / len(needed)]
    assert scores["coverage3"] == [len(needed & named3) / len(needed)]
    assert scores["overfetch1"] == [len(named1) / len(needed)]
    assert scores["overfetch3"] == [len(named3) / len(needed)]
    assert (scores["tokens"], scores["batches"]) == (5, 1)
    assert "layers.0" in str(scores)


def test_fidelity_is_one_for_a_perfect_prediction_and_not_for_a_wrong_one() -> None:
    adapter = make_tiny(top_k=2)
    batches = make_batches(count=2)
    predictor = fit(adapter, batches, steps=1)

    def perfect(embeddings: torch.Tensor, mask: torch.Tensor, candidates: int) -> Candidates:
        batch = next(b for b in batches if torch.equal(adapter.embed(b["input_ids"]), embeddings))
        record = record_routing(adapter, batch)
        ids = torch.full((2, *mask.shape, 2), -1)
        scale = torch.zeros(2, *mask.shape, 2)
        ids[:, mask], scale[:, mask] = record.experts, record.weights
        return Candidates(ids, scale, scale)

    predictor.predict = perfect  # type: ignore[method-assign]
    assert predictor.evaluate(adapter, batches, logits_of)["fidelity"] == 1.0
    predictor.predict = lambda *a: perfect(*a)._replace(  # type: ignore[method-assign]
        ids=perfect(*a).ids.roll(1, 1)
    )
    assert predictor.evaluate(adapter, batches, logits_of)["fidelity"] < 1.0


def test_the_same_seed_gives_the_same_predictor() -> None:
    adapter, batches = make_tiny(), make_batches()
    torch.manual_seed(1)
    first = fit(adapter, batches, "lstm", seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = fit(adapter, batches, "lstm", seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    other = fit(adapter, batches, "lstm", seed=4)
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])
    assert not torch.equal(first.network.routing.weight, other.network.routing.weight)


def test_any_source_of_batches_will_do() -> None:
    adapter, batches = make_tiny(), make_batches(count=3)

    class Loader:
        def __iter__(self) -> Any:
            return iter(batches)

    for source in (batches, Loader(), iter(batches), (b for b in batches)):
        fit(adapter, source)
    fit(adapter, [batch["input_ids"] for batch in batches])
    embedded = [{"inputs_embeds": adapter.embed(b["input_ids"]).detach()} for b in batches]
    fit(adapter, embedded)


def test_the_size_of_embeddings_does_not_matter() -> None:
    scores = []
    for factor in (1.0, 100.0):
        adapter = make_tiny()
        with torch.no_grad():
            adapter.model.embedding.weight.mul_(factor)
            for layer in adapter.model.layers:
                layer.router.gate.weight.div_(factor)
        predictor = fit(adapter, make_batches(), steps=40)
        scores.append(predictor.evaluate(adapter, make_batches(seed=9), logits_of)["top1"][0])
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_only_predictable_layers_get_heads() -> None:
    adapter = make_tiny(layers=3)
    adapter.predictable = [0, 2]
    predictor = fit(adapter, make_batches())
    assert (predictor.layers, predictor.heads, predictor.network.heads) == (3, [0, 2], 2)
    scores = predictor.evaluate(adapter, make_batches(count=1), logits_of)
    assert scores["layers"] == ["layers.0", "layers.2"]


def test_the_loss_is_the_sum_worked_out_token_by_token() -> None:
    adapter = make_tiny(top_k=2)
    network = fit(adapter, make_batches(), steps=1).network
    record = record_routing(adapter, make_batches(seed=3, count=1)[0], top=3)
    record.experts[:, ::3, 1] = -1  # dropped: teaches neither expert nor scale
    logits, scales = network(record.embeddings, record.mask)
    distilled, entropy, error = [], [], []
    for layer in range(2):
        for token in range(logits.shape[1]):
            own, scale = logits[layer, token].double(), scales[layer, token].double()
            top = record.top_ids[layer, token]
            teacher = record.top_logits[layer, token].double().exp()
            teacher = teacher / teacher.sum()
            student = own[top].exp() / own[top].exp().sum()
            distilled.append(sum(teacher * (teacher / student).log()))
            for choice in range(2):
                expert = int(record.experts[layer, token, choice])
                if expert >= 0:
                    entropy.append(-(own.exp() / own.exp().sum())[expert].log())
                    error.append((scale[expert] - record.weights[layer, token, choice]) ** 2)
    expected = sum(map(mean, (distilled, error))) + 0.5 * mean(entropy)
    loss = predictor_loss(network, record, record.embeddings)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_dropped_tokens_teach_no_expert() -> None:
    adapter = make_tiny()
    adapter.routing = lambda layer, output: (output[0], output[1] * 0 + 8, output[2] * 0)  # type: ignore[method-assign]
    record = record_routing(adapter, make_batches(count=1)[0])
    assert (record.experts == -1).all()
    predictor = fit(adapter, make_batches())
    assert all(torch.isfinite(p).all() for p in predictor.network.parameters())


def test_what_cannot_be_right_is_refused() -> None:
    adapter, batches = make_tiny(), make_batches()
    with pytest.raises(ValueError, match="steps >= 1"):
        fit(adapter, batches, steps=0)
    with pytest.raises(ValueError, match="'oracle'"):
        fit(adapter, batches, "oracle")
    with pytest.raises(ValueError, match="got none"):
        fit(adapter, [])
    empty = [{"input_ids": b["input_ids"], "attention_mask": b["input_ids"] * 0} for b in batches]
    with pytest.raises(ValueError, match="got none"):
        fit(adapter, empty)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        fit(adapter, [{"labels": torch.ones(2)}])
    with pytest.raises(ValueError, match=r"shape \[16, 12\], got \[16, 3\]"):
        fit(adapter, [batches[0] | {"attention_mask": torch.ones(16, 3)}])
    adapter.predictable = []
    with pytest.raises(ValueError, match="no MoE layer"):
        fit(adapter, batches)
    with pytest.raises(ValueError, match="trained for another model: fingerprint"):
        fit(make_tiny(), batches).evaluate(make_tiny(seed=1), batches, logits_of)
    with pytest.raises(ValueError, match="experts 8, but the model has 4"):
        fit(make_tiny(), batches).evaluate(make_tiny(experts=4), batches, logits_of)
