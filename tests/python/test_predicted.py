# SPDX-License-Identifier: Apache-2.0
"""Routing from hash tables: predicted, recorded, and whose table it is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from switch_models import (
    decoder_inputs,
    make_batch,
    make_batches,
    make_encoder,
    make_seq2seq,
    relative,
    run,
)

import sida
from sida.huggingface import find_adapter
from sida.torch import fit_predictor


@pytest.fixture(scope="module")
def predictor() -> Any:
    """Of `make_encoder()`."""
    adapter = find_adapter(make_encoder())
    return fit_predictor(adapter, make_batches(4), "token", steps=20, progress=False)


def never(module: Any, inputs: Any) -> None:
    raise AssertionError("the router ran")


@pytest.mark.parametrize("memory", ["1 expert", 0.2, 0.5])
def test_predicted_routing_is_the_same_at_every_budget(predictor: Any, memory: Any) -> None:
    model, batch = make_encoder(), make_batch()
    with sida.offload(model, memory=1.0, routing="predicted", predictor=predictor) as off:
        expected = run(off.model, batch)
    with sida.offload(model, memory=memory, routing="predicted", predictor=predictor) as off:
        for _ in range(2):
            assert torch.equal(run(off.model, batch), expected)
        (output,) = off.map([batch])
        assert torch.equal(output.last_hidden_state, expected)


def test_predicted_routing_is_the_predictors(predictor: Any) -> None:
    model, batch = make_encoder(), make_batch()
    adapter, mask = find_adapter(model), batch["attention_mask"]
    named = predictor.predict(adapter.embed(batch["input_ids"]), mask, 1)
    tables = {
        layer: (named.ids[head].flatten(0, 1), named.scale[head].flatten(0, 1))
        for head, layer in enumerate(predictor.heads)
    }
    with adapter.forced_routing(tables):
        expected = run(model, batch)
    with sida.offload(model, memory=0.5, routing="predicted", predictor=predictor) as off:
        actual = run(off.model, batch)
    tokens = mask == 1
    assert relative(actual[tokens], expected[tokens]) <= 1e-5
    assert relative(actual[tokens], run(model, batch)[tokens]) > 1e-2


def test_predicted_routing_never_runs_a_router_and_leaves_padding_out(predictor: Any) -> None:
    model, batch = make_encoder(), make_batch()
    for router in find_adapter(model).routers():
        router.register_forward_pre_hook(never)
    with sida.offload(model, memory=0.5, routing="predicted", predictor=predictor) as off:
        seen: list[Any] = []
        off.model.encoder.block[3].layer[1].mlp.register_forward_hook(
            lambda module, inputs, output: seen.append(output)
        )
        run(off.model, batch)
        padding = batch["attention_mask"] == 0
        assert not seen[0][padding].any() and seen[0][~padding].any()
        stats = off.stats()
        assert stats["predicted_layers"] == find_adapter(model).layer_names
        assert stats["exact_layers"] == []
        assert [layer["predicted_calls"] for layer in stats["layers"]] == [1, 1]


def test_only_padding_and_no_router_either(predictor: Any) -> None:
    model, batch = make_encoder(), make_batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    for router in find_adapter(model).routers():
        router.register_forward_pre_hook(never)
    with sida.offload(model, memory=0.5, routing="predicted", predictor=predictor) as off:
        assert run(off.model, batch).isfinite().all()
        assert off.stats()["uses"] == 0


def test_router_logits_are_those_of_routers_that_ran(predictor: Any) -> None:
    model, batch = make_encoder(), make_batch()
    with sida.offload(model, memory=0.5, predictor=predictor) as off, torch.no_grad():
        assert len(off.model(**batch, output_router_logits=True).router_logits) == 2
    with (
        sida.offload(model, memory=0.5, routing="predicted", predictor=predictor) as off,
        torch.no_grad(),
    ):
        assert not off.model(**batch, output_router_logits=True).router_logits


def test_a_layer_by_itself_has_no_table(predictor: Any) -> None:
    with (
        sida.offload(make_encoder(), memory=0.5, routing="predicted", predictor=predictor) as off,
        torch.no_grad(),
        pytest.raises(RuntimeError, match="call the model or its encoder"),
    ):
        off.model.encoder.block[1].layer[1].mlp(torch.zeros(1, 3, 32))


def test_decoders_route_exactly() -> None:
    model, batch = make_seq2seq(), decoder_inputs(make_batch())
    adapter = find_adapter(model)
    predictor = fit_predictor(adapter, make_batches(2), "token", steps=5, progress=False)
    for layer in adapter.predictable:
        adapter.routers()[layer].register_forward_pre_hook(never)
    with sida.offload(model, memory=0.3, routing="predicted", predictor=predictor) as off:
        first = run(off.model, batch)
        assert off.stats()["predicted_layers"] == adapter.layer_names[:2]
        assert off.stats()["exact_layers"] == adapter.layer_names[2:]
        assert [layer["predicted_calls"] for layer in off.stats()["layers"]] == [1, 1, 0, 0]
        generated = off.model.generate(**make_batch(), max_new_tokens=4, num_beams=2)
        off.resize(1.0)
        assert torch.equal(run(off.model, batch), first)
        again = off.model.generate(**make_batch(), max_new_tokens=4, num_beams=2)
        assert torch.equal(again, generated)


def test_a_predictor_may_be_an_object_or_a_file(predictor: Any, tmp_path: Path) -> None:
    path, batch = tmp_path / "predictor.safetensors", make_batch()
    predictor.save(path)
    forms = [predictor, path, str(path), sida.HashPredictor.load(path), sida.load_predictor(path)]
    outputs = []
    for form in forms:
        with sida.offload(make_encoder(), memory=0.5, routing="predicted", predictor=form) as off:
            outputs.append(run(off.model, batch))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_predictor_of_another_model_is_refused(predictor: Any) -> None:
    for model, what in [
        (make_encoder(seed=1), "fingerprint"),
        (make_encoder(num_experts=4), "experts 8, but the model has 4"),
        (make_seq2seq(), "MoE layers 2, but the model has 4"),
    ]:
        with pytest.raises(ValueError, match=f"another model: {what}"):
            sida.offload(model, memory=0.5, predictor=predictor)


def test_recorded_routing_is_what_a_perfect_predictor_gives(tmp_path: Path) -> None:
    model, batches = make_encoder(), make_batches(4)
    with sida.offload(model, memory=0.5) as off:
        expected = [run(off.model, batch) for batch in batches]
        returned = off.record(tmp_path / "table")
    table = sida.HashTable.load(tmp_path / "table")
    assert len(table) == len(returned) == 4 and (table.ids == returned.ids).all()
    for form in (table, tmp_path / "table"):
        with sida.offload(model, memory=0.5, predictor=form) as off:
            for output, values in zip(off.map(batches), expected, strict=True):
                assert torch.equal(output.last_hidden_state, values)
        with sida.offload(model, memory=0.2, routing="predicted", predictor=form) as off:
            outputs = [run(off.model, batch) for batch in batches]
        for batch, output, values in zip(batches, outputs, expected, strict=True):
            tokens = batch["attention_mask"] == 1
            assert relative(output[tokens], values[tokens]) <= 1e-6


def test_record_begins_anew_with_the_statistics(tmp_path: Path) -> None:
    with sida.offload(make_encoder(), memory=0.5) as off:
        run(off.model, make_batch(0))
        off.reset_stats()
        run(off.model, make_batch(1))
        assert len(off.record(tmp_path / "table")) == 1


@pytest.mark.parametrize("routing", ["exact", "predicted"])
@pytest.mark.parametrize("change", ["ids", "mask"])
def test_a_batch_that_was_not_recorded_raises(tmp_path: Path, routing: str, change: str) -> None:
    model, batch = make_encoder(), make_batch()
    with sida.offload(model, memory=0.5) as off:
        run(off.model, batch)
        table = off.record(tmp_path / "table")
    other = {name: values.clone() for name, values in batch.items()}
    other["input_ids" if change == "ids" else "attention_mask"][0, -1] ^= 1
    with sida.offload(model, memory=0.5, routing=routing, predictor=table) as off:
        with pytest.raises(ValueError, match=r"no batch with these token ids.*off\.record"):
            run(off.model, other)
        results = off.map([batch, other, batch])
        next(results)
        with pytest.raises(ValueError, match="no batch with these token ids"):
            next(results)
        run(off.model, batch)


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    with sida.offload(make_encoder(), memory=0.5) as off:
        run(off.model, make_batch())
        table = off.record(tmp_path / "table")
    with pytest.raises(ValueError, match="2 MoE layers, the model 4"):
        sida.offload(make_seq2seq(), memory=0.5, predictor=table)
    with pytest.raises(ValueError, match=r"names expert \d, the model has 4"):
        sida.offload(make_encoder(num_experts=4), memory=0.5, predictor=table)


def test_a_predictor_of_ones_own() -> None:
    model, batch = make_encoder(), make_batch()

    class First:
        """Every token goes to expert 2 with scale 0.5."""

        kind, layers, heads, experts = "first", 2, [0, 1], 8
        fingerprint = find_adapter(model).fingerprint()

        def predict(
            self, embeddings: Any, mask: Any, *, key: int, candidates: int
        ) -> sida.HashTable:
            assert embeddings.shape == (5, 12, 32) and candidates >= 1
            ids = torch.where(mask.flatten() == 0, -1, 2).expand(2, -1)[..., None].int().numpy()
            probs = (ids >= 0).astype("float32")
            return sida.HashTable(
                layers=2, candidates=1, keys=[key], offsets=[0, mask.numel()],
                ids=ids, probs=probs, scale=probs / 2,
            )  # fmt: skip

    tokens = batch["attention_mask"] == 1
    ids = torch.full((60, 1), 2)
    with find_adapter(model).forced_routing({i: (ids, torch.full((60, 1), 0.5)) for i in (0, 1)}):
        expected = run(model, batch)
    with sida.offload(model, memory=0.2, routing="predicted", predictor=First()) as off:
        actual = run(off.model, batch)
        assert [layer["uses"] for layer in off.stats()["layers"]] == [1, 1]
    assert relative(actual[tokens], expected[tokens]) <= 1e-5


def test_padding_is_left_out_even_if_the_table_names_experts_for_it(tmp_path: Path) -> None:
    model, batch = make_encoder(), make_batch()
    with sida.offload(model, memory=0.5) as off:
        run(off.model, batch)
        table = off.record(tmp_path / "table")
    padding = batch["attention_mask"] == 0
    table = sida.HashTable(
        layers=table.layers,
        candidates=1,
        keys=table.keys,
        offsets=table.offsets,
        ids=table.ids.clip(0),
        probs=table.probs,
        scale=table.scale.clip(0.5),
    )
    with sida.offload(model, memory=0.5, routing="predicted", predictor=table) as off:
        seen: list[Any] = []
        hook = (
            off.model.encoder.block[1]
            .layer[1]
            .mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
        )
        run(off.model, batch)
        hook.remove()
    assert not seen[0][padding].any() and seen[0][~padding].any()


def test_a_batch_other_than_the_one_looked_at_has_its_own_table(predictor: Any) -> None:
    first, second = make_batches(2)
    with sida.offload(make_encoder(), memory=0.3, routing="predicted", predictor=predictor) as off:
        expected = run(off.model, second)
        (actual,) = off.map([first], lambda model, batch: run(model, second))
        assert torch.equal(actual, expected)


def test_threads_do_not_take_each_others_tables(predictor: Any) -> None:
    batches = make_batches(4)
    with sida.offload(make_encoder(), memory=0.3, routing="predicted", predictor=predictor) as off:
        expected = [run(off.model, batch) for batch in batches]
        wrong: list[int] = []

        def work(index: int) -> None:
            for _ in range(15):
                if not torch.equal(run(off.model, batches[index]), expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for output in off.map([batches[3]] * 15):
            if not torch.equal(output.last_hidden_state, expected[3]):
                wrong.append(3)
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)
