# SPDX-License-Identifier: Apache-2.0
"""What predictors and handles read off Switch Transformers."""

from __future__ import annotations

import gc
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from switch_models import (
    decoder_inputs,
    make_batch,
    make_encoder,
    make_model,
    make_seq2seq,
    relative,
    run,
)

import sida
from sida.huggingface import find_adapter
from sida.torch import record_routing


def test_layers_in_model_order() -> None:
    adapter = find_adapter(make_seq2seq())
    assert adapter.layer_names == [
        "encoder.block.1.layer.1.mlp",
        "encoder.block.3.layer.1.mlp",
        "decoder.block.1.layer.2.mlp",
        "decoder.block.3.layer.2.mlp",
    ]
    assert adapter.predictable == [0, 1]
    assert (adapter.num_experts, adapter.top_k) == (8, 1)
    many = find_adapter(make_encoder(num_layers=24, num_sparse_encoder_layers=12))
    assert [int(name.split(".")[2]) for name in many.layer_names] == list(range(1, 24, 2))


def test_an_encoder_alone() -> None:
    model = make_encoder()
    adapter = find_adapter(model.encoder)
    assert adapter.layer_names[0] == "block.1.layer.1.mlp"
    expected = run(model, make_batch())
    with sida.offload(model.encoder, memory=0.2):
        assert relative(run(model, make_batch()), expected) <= 1e-5


def test_embeddings_are_what_the_first_block_reads() -> None:
    model, batch = make_model(), make_batch()
    seen: list[Any] = []
    hook = model.encoder.block[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    run(model, decoder_inputs(batch))
    hook.remove()
    embeddings = find_adapter(model).embed(batch["input_ids"])
    assert torch.equal(embeddings, seen[0]) and not embeddings.requires_grad


def test_routing_is_what_the_router_decided() -> None:
    model, batch = make_encoder(expert_capacity=1), make_batch()
    adapter = find_adapter(model)
    reads: dict[int, Any] = {}
    inputs: dict[int, Any] = {}
    for layer, router in enumerate(adapter.routers()):
        router.register_forward_hook(
            lambda m, i, o, layer=layer: (
                reads.update({layer: adapter.routing(layer, o)}),
                inputs.update({layer: i[0]}),
                None,
            )[-1]
        )
    run(model, batch)
    for layer, (logits, ids, weights) in reads.items():
        router = adapter.routers()[layer]
        expected = router.classifier(inputs[layer]).flatten(0, -2)
        assert logits.shape == (60, 8) and torch.allclose(logits, expected)
        assert ids.shape == weights.shape == (60, 1)
        chosen = ids >= 0
        assert chosen.any()
        assert torch.equal(ids[chosen], logits.argmax(-1, keepdim=True)[chosen])
        assert torch.allclose(weights, logits.softmax(-1).amax(-1, keepdim=True))


def test_routing_can_be_recorded_from_original_and_offloaded() -> None:
    model, batch = make_encoder(), make_batch()
    expected = record_routing(find_adapter(model), batch)
    with sida.offload(model, memory=0.2):
        actual = record_routing(find_adapter(model), batch)
    assert torch.equal(actual.experts, expected.experts)
    assert torch.allclose(actual.top_logits, expected.top_logits, atol=1e-4)
    assert expected.experts.shape == (2, int(batch["attention_mask"].sum()), 1)


def test_forcing_what_was_decided_changes_nothing() -> None:
    model, batch = make_seq2seq(), decoder_inputs(make_batch())
    adapter, tables = find_adapter(model), {}
    hooks = [
        router.register_forward_hook(
            lambda m, i, o, layer=layer: tables.update({layer: adapter.routing(layer, o)[1:]})
        )
        for layer, router in enumerate(adapter.routers())
    ]
    expected = run(model, batch)
    for hook in hooks:
        hook.remove()
    assert len(tables) == 4
    with adapter.forced_routing(tables):
        assert torch.equal(run(model, batch), expected)


def test_forcing_other_routing_is_followed() -> None:
    model, batch = make_encoder(), make_batch()
    adapter, mlp = find_adapter(model), model.encoder.block[1].layer[1].mlp
    ids = torch.arange(60)[:, None] % 9 - 1  # -1 to 7
    weights = torch.rand(60, 1)
    seen: list[Any] = []
    hook = mlp.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    expected = run(model, batch)
    with adapter.forced_routing({0: (ids, weights)}):
        assert relative(run(model, batch), expected) > 1e-2
    assert torch.equal(run(model, batch), expected)
    hook.remove()
    x, y = (values.flatten(0, 1) for values in seen[1])
    with torch.no_grad():
        for token in range(60):
            expert = int(ids[token])
            wanted = (
                mlp.experts[f"expert_{expert}"](x[token]) * weights[token] if expert >= 0 else 0.0
            )
            assert torch.allclose(y[token], torch.as_tensor(wanted).expand_as(y[token]), atol=1e-5)
    with (
        adapter.forced_routing({0: (ids[:5], weights[:5])}),
        pytest.raises(ValueError, match="routing of 60 tokens, got 5"),
    ):
        run(model, batch)


def test_fingerprint_tells_models_by_their_routing() -> None:
    def of(model: Any) -> str:
        return find_adapter(model).fingerprint()

    same, model = of(make_encoder()), make_encoder()
    assert len(same) == 64 and of(model) == same
    with sida.offload(model, memory=0.2):
        assert of(model) == same
    assert of(make_encoder().to(torch.bfloat16)) == same
    for parameter in find_adapter(model).parameters(0)[0].module.parameters():
        parameter.data.add_(1)
    assert of(model) == same  # never experts
    run(model, make_batch())
    assert of(model) == same
    others = [make_encoder(seed=1), make_encoder(expert_capacity=4), make_encoder(), make_encoder()]
    others[2].shared.weight.data[5, 5] += 0.5
    others[3].encoder.block[3].layer[1].mlp.router.classifier.weight.data[1, 1] += 0.5
    assert len({same, *map(of, others)}) == 5


def test_an_adapter_leaves_no_hooks_behind() -> None:
    model = make_encoder()
    adapter = find_adapter(model)
    routers = adapter.routers()
    assert any(router.classifier._forward_hooks for router in routers)
    del adapter
    gc.collect()
    assert not any(router.classifier._forward_hooks for router in routers)
