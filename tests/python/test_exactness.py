# SPDX-License-Identifier: Apache-2.0
"""Offloaded models say what the originals say, to the bit at every budget and policy."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from switch_models import (
    MARGIN,
    decoder_inputs,
    experts_of,
    make_batch,
    make_encoder,
    make_model,
    make_seq2seq,
    margins,
    relative,
    run,
    wrong_table,
)

import sida

BUDGETS = ["1 expert", 0.1, 0.5, 1.0]
POLICIES = ["fifo", "lru", "lfu", "lookahead", "auto"]
KINDS = {
    "encoder": (make_encoder, lambda batch: batch),
    "encoder-decoder": (make_model, decoder_inputs),
    "with a head": (make_seq2seq, decoder_inputs),
}


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_at_every_budget_and_the_originals_numbers(kind: str) -> None:
    make, inputs = KINDS[kind]
    model, batch = make(), inputs(make_batch())
    expected = run(model, batch)
    outputs = []
    for memory in BUDGETS:
        with sida.offload(model, memory=memory) as off:
            outputs += [run(off.model, batch), run(off.model, batch)]
    assert relative(outputs[0], expected) <= 1e-5
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(run(model, batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_one_routed_expert_would_be_seen(kind: str) -> None:
    make, inputs = KINDS[kind]
    model, batch = make(), inputs(make_batch())
    expected = run(model, batch)
    adapter = sida.huggingface.find_adapter(model)
    for layer in range(len(adapter.layer_names)):
        moved = []
        for _, down, *_ in adapter.arrays(layer):
            kept = down.clone()
            down.zero_()
            moved.append(relative(run(model, batch), expected))
            down.copy_(kept)
        used = [distance for distance in moved if distance > 0]
        assert used and min(used) >= 1e-2


@pytest.mark.parametrize("policy", POLICIES)
def test_same_bits_with_every_policy_and_number_of_threads(policy: str) -> None:
    model, batch = make_seq2seq(), decoder_inputs(make_batch())
    with sida.offload(model, memory=1.0) as off:
        expected = run(off.model, batch)
    for threads in (1, 2, 3):
        with sida.offload(model, memory=0.2, policy=policy, threads=threads) as off:
            for _ in range(3):
                assert torch.equal(run(off.model, batch), expected)


def test_same_bits_with_any_prediction(tmp_path: Any) -> None:
    model, batch = make_encoder(), make_batch()
    with sida.offload(model, memory=1.0) as off:
        expected = run(off.model, batch)
        table = off.record(tmp_path / "table")
    for predictor in (table, wrong_table(table)):
        for memory in ("1 expert", 0.3):
            with sida.offload(model, memory=memory, predictor=predictor) as off:
                assert torch.equal(run(off.model, batch), expected)


@pytest.mark.parametrize("memory", ["1 expert", 0.5, 1.0])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_the_same_tokens(beams: int, memory: Any) -> None:
    model, batch = make_seq2seq(), make_batch(sentences=6)
    options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    with margins(model, 6) as least:
        expected = model.generate(**batch, **options)
    clear = least >= MARGIN
    print(f"{int((~clear).sum())} of 6 sequences have a margin under {MARGIN}")
    assert clear.sum() >= 3
    with sida.offload(model, memory=memory) as off:
        actual = off.model.generate(**batch, **options)
    assert torch.equal(actual[clear], expected[clear])


def test_generate_of_several_returned_sequences() -> None:
    model, batch = make_seq2seq(), make_batch(sentences=3)
    options = {"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 2}
    with margins(model, 3) as least:
        expected = model.generate(**batch, **options)
    with sida.offload(model, memory=0.3) as off:
        actual = off.model.generate(**batch, **options)
    clear = (least >= MARGIN).repeat_interleave(2)
    assert clear.any() and torch.equal(actual[clear], expected[clear])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(dtype: Any, limit: float) -> None:
    # One MoE layer: in a second one a rounding upstream may change an expert.
    model = make_encoder(num_layers=2, num_sparse_encoder_layers=1).to(dtype)
    batch = make_batch()
    with margins(model, 5):
        expected = run(model, batch)
    outputs = []
    for memory in BUDGETS[1:]:
        with sida.offload(model, memory=0.2 if memory == 0.1 else memory) as off:
            outputs.append(run(off.model, batch))
    assert outputs[0].dtype == dtype
    assert relative(outputs[0], expected) <= limit
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(run(model, batch), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu"])
def test_activations(activation: str) -> None:
    model, batch = make_encoder(dense_act_fn=activation), make_batch()
    expected = run(model, batch)
    with sida.offload(model, memory=0.5) as off:
        assert relative(run(off.model, batch), expected) <= 1e-5


@pytest.mark.parametrize("capacity", [1, 64])
def test_the_installed_versions_capacity_rule(capacity: int) -> None:
    model, batch = make_encoder(expert_capacity=capacity), make_batch()
    expected = run(model, batch)
    with sida.offload(model, memory=0.5) as off:
        assert relative(run(off.model, batch), expected) <= 1e-5


def test_exact_routing_computes_padding_as_the_original_does() -> None:
    model, batch = make_encoder(), make_batch()
    expected, padding = run(model, batch), batch["attention_mask"] == 0
    with sida.offload(model, memory=0.5) as off:
        actual = run(off.model, batch)
    assert relative(actual[padding], expected[padding]) <= 1e-5


def test_skip_padding_leaves_tokens_as_they_are() -> None:
    model, batch = make_encoder(), make_batch()
    expected, tokens = run(model, batch), batch["attention_mask"] == 1
    with sida.offload(model, memory=0.5, skip_padding=True) as off:
        seen = []
        hook = (
            off.model.encoder.block[1]
            .layer[1]
            .mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
        )
        actual = run(off.model, batch)
        hook.remove()
    assert relative(actual[tokens], expected[tokens]) <= 1e-5
    assert not seen[0][~tokens].any() and seen[0][tokens].any()


@pytest.mark.parametrize("memory", ["1 expert", 1.0])
def test_no_tokens(memory: Any) -> None:
    model, batch = make_encoder(), make_batch()
    expected = run(model, batch)
    with sida.offload(model, memory=memory) as off:
        layer = off.model.encoder.block[1].layer[1].mlp
        with torch.no_grad():
            assert layer(torch.empty(0, 12, 32)).shape == (0, 12, 32)
        with pytest.raises(RuntimeError, match="0 elements"):  # transformers' attention, not sida
            run(off.model, make_batch(sentences=0))
        assert off.stats()["uses"] == 0
        assert relative(run(off.model, batch), expected) <= 1e-5


def test_only_padding() -> None:
    model, batch = make_encoder(), make_batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    expected = run(model, batch)
    with sida.offload(model, memory=0.2) as off:
        assert relative(run(off.model, batch), expected) <= 1e-5
        assert off.stats()["uses"] == 0 and off.stats()["tokens"] == 0


def test_embeddings_instead_of_ids() -> None:
    model, batch = make_encoder(), make_batch()
    embeddings = model.shared(batch["input_ids"]).detach()
    inputs = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    expected = run(model, inputs)
    with sida.offload(model, memory=0.5) as off:
        assert relative(run(off.model, inputs), expected) <= 1e-5


def test_positional_arguments() -> None:
    model, batch = make_encoder(), make_batch()
    expected = run(model, batch)
    with sida.offload(model, memory=0.5) as off, torch.no_grad():
        actual = off.model.encoder(batch["input_ids"], batch["attention_mask"])[0]
    assert relative(actual, expected) <= 1e-5


def test_calls_from_several_threads_take_turns() -> None:
    model = make_seq2seq()
    batches = [decoder_inputs(make_batch(seed)) for seed in range(4)]
    with sida.offload(model, memory=0.2) as off:
        expected = [run(off.model, batch) for batch in batches]
        wrong: list[int] = []

        def work(index: int) -> None:
            for _ in range(5):
                if not torch.equal(run(off.model, batches[index]), expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)


def test_weights_are_equal_after_closing() -> None:
    model = make_seq2seq()
    before = {name: weight.clone() for name, weight in experts_of(model).items()}
    sida.offload(model, memory=0.1).close()
    after = experts_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
