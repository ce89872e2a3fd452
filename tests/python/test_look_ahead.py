# SPDX-License-Identifier: Apache-2.0
"""Look-ahead: the next layer's router on this layer's input, in decoders that route exactly."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import FAMILIES, generate, make_family, make_prompt
from switch_models import decoder_inputs, make_batch, make_seq2seq, run
from torch import Tensor, nn

import sida
from sida.huggingface import find_adapter

LAYERS = 4
BUDGETS = ["1 expert", "3 experts", 0.25, 0.6]


def make_deep(family: str, **changes: Any) -> Any:
    """A decoder in which more than one layer looks ahead."""
    if family == "gpt_oss":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return make_family(family, num_hidden_layers=LAYERS, **changes)


def logits(model: Any, prompt: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**prompt).logits
    return out


def expected_counts(model: Any, prompt: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    """By layer: uses, experts that the router chooses on the layer before's input, both at once."""
    routers = [m for n, m in model.named_modules() if n.endswith((".gate", ".router"))]
    inputs: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda m, args, out: inputs.append(args[0])) for r in routers]
    logits(model, prompt)
    for hook in hooks:
        hook.remove()
    rows = prompt["attention_mask"].flatten() == 1

    def chosen(router: nn.Module, hidden: Tensor) -> set[int]:
        with torch.no_grad():
            values = router(hidden.reshape(-1, hidden.shape[-1]))
        (ids,) = (v for v in values if not v.is_floating_point())
        return set(ids.reshape(len(rows), -1)[rows].flatten().tolist())

    counts = [(0, 0, 0)]
    for (_, before), (router, own) in pairwise(zip(routers, inputs, strict=True)):
        needed, foretold = chosen(router, own), chosen(router, before)
        counts.append((len(needed), len(foretold), len(needed & foretold)))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_routers_themselves(family: str) -> None:
    model, prompt = make_deep(family), make_prompt(sentences=2, length=4)
    expected = expected_counts(model, prompt)
    with sida.offload(model, memory=0.5) as off:
        logits(off.model, prompt)
        stats = off.stats()
    names = ("uses", "foretold", "foretold_uses")
    ahead = [layer["look_ahead"] for layer in stats["layers"]]
    assert [tuple(layer[name] for name in names) for layer in ahead] == expected
    totals = [sum(counts) for counts in zip(*expected, strict=True)]
    whole = stats["look_ahead"]
    assert [whole[name] for name in names] == totals
    assert whole["hit_rate"] == totals[2] / totals[0]
    assert whole["precision"] == totals[2] / totals[1]
    assert ahead[0]["hit_rate"] is None and ahead[0]["precision"] is None
    assert whole["off"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_misses_and_the_same_bits(family: str) -> None:
    model, prompt = make_deep(family), make_prompt()
    with sida.offload(model, memory=1.0) as off:
        expected, tokens = logits(off.model, prompt), generate(off.model, prompt)
    for memory in BUDGETS:
        misses = {}
        for predictor in (None, False):
            with sida.offload(model, memory=memory, predictor=predictor) as off:
                assert torch.equal(logits(off.model, prompt), expected)
                assert generate(off.model, prompt) == tokens
                stats = off.stats()
            misses[predictor] = stats["misses"]
            assert stats["hits"] + stats["late"] + stats["misses"] == stats["uses"]
            ahead = stats["look_ahead"]
            assert ahead["used"] + ahead["wasted"] + ahead["cancelled"] <= ahead["loads"]
            assert ahead["loads"] <= stats["prefetches"]
            assert (ahead["uses"] > 0) == (predictor is None)
        assert misses[None] < 0.8 * misses[False]  # hidden states change little between layers


def test_off_where_nothing_can_be_missing() -> None:
    model, prompt = make_deep("qwen3_moe"), make_prompt()
    routers = [m for n, m in model.named_modules() if n.endswith(".gate")]
    with sida.offload(model, memory=1.0) as off, _counted(routers) as calls:
        generate(off.model, prompt)
        assert len(calls) == LAYERS * off.stats()["passes"]  # their own layers' calls
        assert off.stats()["look_ahead"]["uses"] == off.stats()["look_ahead"]["loads"] == 0


def test_switched_off_it_asks_no_router() -> None:
    model, prompt = make_deep("qwen3_moe"), make_prompt()
    routers = [m for n, m in model.named_modules() if n.endswith(".gate")]
    with sida.offload(model, memory=0.5, predictor=False) as off, _counted(routers) as calls:
        generate(off.model, prompt)
        stats = off.stats()
    assert len(calls) == LAYERS * stats["passes"]
    assert stats["look_ahead"]["off"] == ["predictor=False"] and stats["prefetches"] == 0


class _counted:
    """Notes calls of the routers' class, hooks or not."""

    def __init__(self, routers: list[nn.Module]) -> None:
        self._kind: Any = type(routers[0])

    def __enter__(self) -> list[nn.Module]:
        calls: list[nn.Module] = []
        self._forward = forward = self._kind.forward

        def note(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return forward(module, *args, **kwargs)

        self._kind.forward = note
        return calls

    def __exit__(self, *error: object) -> None:
        self._kind.forward = self._forward


def test_router_logits_and_hooks_see_the_models_own_calls_only() -> None:
    model, prompt = make_deep("mixtral"), make_prompt()
    expected = model(**prompt, output_router_logits=True).router_logits
    gate = model.model.layers[1].mlp.gate
    calls: list[int] = []
    hook = gate.register_forward_hook(lambda *_: calls.append(1))
    with sida.offload(model, memory=0.5) as off, torch.no_grad():
        found = off.model(**prompt, output_router_logits=True).router_logits
        assert off.stats()["look_ahead"]["foretold"] > 0
    hook.remove()
    assert len(calls) == 1 and len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_padding_is_not_foretold() -> None:
    model = make_deep("olmoe")
    prompt = make_prompt(sentences=1, length=3)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 6, dtype=torch.long), prompt["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(1, 6, dtype=torch.long)] * 1, 1),
    }
    padded["attention_mask"] = torch.cat([padded["attention_mask"], prompt["attention_mask"]], 1)
    found = []
    for inputs in (padded, {k: v[:, v.shape[1] - 3 :] for k, v in padded.items()}):
        with sida.offload(model, memory=0.5) as off:
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            logits(off.model, {**inputs, "position_ids": positions})
            ahead = off.stats()["look_ahead"]
            found.append({k: ahead[k] for k in ("uses", "foretold", "foretold_uses")})
    assert found[0] == found[1] and found[0]["foretold"] > 0


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_beams_and_chunks(options: dict[str, Any]) -> None:
    model, prompt = make_deep("qwen3_moe"), make_prompt()
    wanted = {"do_sample": False, "max_new_tokens": 6, **options}
    with sida.offload(model, memory=1.0) as off:
        expected = off.model.generate(**prompt, **wanted)
    with sida.offload(model, memory=0.3) as off:
        assert torch.equal(off.model.generate(**prompt, **wanted), expected)
        assert off.stats()["look_ahead"]["used"] > 0


def test_assisted_decoding() -> None:
    model, assistant = make_deep("qwen3_moe"), make_family("qwen3_moe", seed=1)
    prompt = make_prompt(sentences=1)
    wanted = {"do_sample": False, "max_new_tokens": 8, "assistant_model": assistant}
    with sida.offload(model, memory=1.0) as off:
        expected = off.model.generate(**prompt, **wanted)
    with sida.offload(model, memory=0.3) as off, sida.offload(assistant, memory=0.3) as other:
        assert torch.equal(off.model.generate(**prompt, **wanted), expected)
        assert off.stats()["look_ahead"]["used"] > 0 and other.stats()["look_ahead"]["used"] > 0


def test_the_decoder_of_switch_looks_ahead_and_its_encoder_does_not() -> None:
    model = make_seq2seq(num_decoder_layers=4, num_sparse_decoder_layers=4)
    inputs = decoder_inputs(make_batch(sentences=2), length=3)
    with sida.offload(model, memory=1.0) as off:
        expected = run(off.model, inputs)
    with sida.offload(model, memory=0.3) as off:
        assert torch.equal(run(off.model, inputs), expected)
        stats = off.stats()
    for layer in stats["layers"]:
        is_foretold = layer["name"].startswith("decoder.block.") and ".0." not in layer["name"][:16]
        assert (layer["look_ahead"]["foretold"] > 0) == is_foretold, layer["name"]


def test_a_router_that_fails_elsewhere_is_named_and_nothing_else_changes() -> None:
    model, prompt = make_deep("qwen3_moe"), make_prompt()
    with sida.offload(model, memory=1.0) as off:
        expected = generate(off.model, prompt)
    own = model.model.layers[1].mlp.gate

    class Picky(type(own)):  # type: ignore[misc]
        def forward(self, hidden: Tensor) -> Any:
            if not getattr(self, "expected", False):
                raise RuntimeError("nobody asked")
            return super().forward(hidden)

    own.__class__ = Picky
    own.register_forward_pre_hook(lambda m, args: setattr(m, "expected", True))
    own.register_forward_hook(lambda m, args, out: setattr(m, "expected", False))
    with sida.offload(model, memory=0.3) as off:
        assert generate(off.model, prompt) == expected
        stats = off.stats()
    assert stats["look_ahead"]["off"] == ["model.layers.1.mlp: RuntimeError: nobody asked"]
    assert [layer["look_ahead"]["foretold"] > 0 for layer in stats["layers"]] == [0, 0, 1, 1]


def test_routers_in_training_are_left_alone() -> None:
    model, prompt = make_deep("mixtral", router_jitter_noise=0.1), make_prompt()
    with sida.offload(model, memory=0.5) as off:
        model.train()
        torch.manual_seed(3)
        first = logits(off.model, prompt)
        assert off.stats()["look_ahead"]["uses"] == 0
    with sida.offload(model, memory=1.0) as off:
        torch.manual_seed(3)
        assert torch.equal(logits(off.model, prompt), first)


def test_every_router_of_a_family_takes_what_its_layer_gives_it() -> None:
    model = make_deep("qwen3_moe")
    adapter = find_adapter(model)
    block = model.model.layers[2].mlp
    own = type(block.gate)

    class Biased(own):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Tensor, expert_bias: Tensor) -> Any:
            logits, weights, _ = super().forward(hidden)
            return logits, weights, (logits + expert_bias).topk(3).indices

    block.gate.__class__ = Biased
    block.expert_bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 9e9, 9e9, 9e9])
    ids = adapter.choices(2, torch.randn(5, 32))
    assert ids is not None and ids.sort().values.tolist() == [[4, 5, 6]] * 5


def test_shown_among_the_statistics() -> None:
    model, prompt = make_deep("olmoe"), make_prompt()
    with sida.offload(model, memory=0.5) as off:
        assert "look-ahead" not in str(off.stats())
        generate(off.model, prompt)
        stats = off.stats()
    ahead = stats["look_ahead"]
    assert ahead["bytes_used"] == ahead["used"] * stats["slot_bytes"]
    assert ahead["bytes_wasted"] == ahead["wasted"] * stats["slot_bytes"]
    (line,) = (line for line in str(stats).splitlines() if line.startswith("look-ahead"))
    assert f"foretold {100 * ahead['hit_rate']:.1f} % of the uses" in line
    assert f"{ahead['used']} were used, {ahead['wasted']} wasted" in line
    assert line in stats._repr_html_()


def test_predicted_routing_needs_a_predictor() -> None:
    with pytest.raises(ValueError, match="needs predictor="):
        sida.offload(make_seq2seq(), memory=0.5, routing="predicted", predictor=False)
    with pytest.raises(TypeError, match="got bool"):
        sida.offload(make_seq2seq(), memory=0.5, predictor=True)  # type: ignore[arg-type]
