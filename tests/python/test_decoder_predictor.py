# SPDX-License-Identifier: Apache-2.0
"""Predictors of decoders: hash tables that go on from token to token, whatever becomes of beams."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_models import FAMILIES, generate, make_family, make_prompt
from switch_models import make_encoder, relative
from torch import Tensor

import sida
from sida import HashPredictor
from sida.huggingface import find_adapter
from sida.huggingface.decoding import PredictorStates
from sida.torch import Predictor
from sida.torch.architectures import make_network
from sida.torch.train import fit_predictor

KINDS = ["causal_lstm", "token"]


def untrained(model: Any, kind: str = "causal_lstm") -> Predictor:
    """A predictor with random weights, large enough for context to matter."""
    adapter = find_adapter(model)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = make_network(
            kind, 32, adapter.num_experts, len(adapter.predictable), hidden_size=16
        )
        for parameter in network.parameters():
            parameter.data.mul_(3)
        network.compress.weight.data.mul_(20)
    return Predictor(
        kind,
        network.requires_grad_(False),
        layers=len(adapter.layer_names),
        heads=list(adapter.predictable),
        fingerprint=adapter.fingerprint(),
    )


def loaded(predictor: Predictor, folder: Path) -> HashPredictor:
    predictor.save(folder / "predictor.safetensors")
    return HashPredictor.load(folder / "predictor.safetensors")


@contextmanager
def watched(off: Any, predictor: HashPredictor) -> Iterator[list[int]]:
    """Hold every pass's table against what is foretold of its whole sequences at once.

    The sequences are those of which `generate` prepares the inputs. Yields the number of tokens in
    each pass, 0 where it had no table.
    """
    model, adapter = off.model, find_adapter(off.model)
    embed = adapter.embed
    whole: list[tuple[Tensor, Tensor]] = []
    passes: list[int] = []
    prepare = model.prepare_inputs_for_generation

    def note(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        whole.append((input_ids.clone(), torch.ones_like(input_ids) if mask is None else mask))
        return prepare(input_ids, *args, **kwargs)

    def compare(*_: Any) -> None:
        table = off._engine.scheduler.current_table()
        ids, mask = whole[-1]
        passes.append(0 if table is None else table.tokens)
        if table is None:
            return
        mask = mask[:, : ids.shape[1]]
        expected = predictor.predict(embed(ids).contiguous(), mask.to(torch.uint8).contiguous())
        latest = table.tokens // len(ids)
        shape = (table.layers, len(ids), -1, table.candidates)
        for name in ("ids", "probs", "scale"):
            got = torch.tensor(getattr(table, name)).view(shape)
            wanted = torch.tensor(getattr(expected, name)).view(shape)
            if name == "probs":  # of any of a token's choices, where the predictor's are of one
                wanted = (adapter.top_k * wanted).clamp(max=1)
            torch.testing.assert_close(got, wanted[:, :, -latest:], rtol=0, atol=1e-5)

    hook = find_adapter(model).stack().layers[0].register_forward_pre_hook(compare)
    model.prepare_inputs_for_generation = note
    try:
        yield passes
    finally:
        hook.remove()
        del model.prepare_inputs_for_generation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["greedy", "sampling", "beams", "no cache", "assisted"])
def test_each_pass_foretells_what_the_whole_sequence_does(
    way: str, kind: str, tmp_path: Path
) -> None:
    model = make_family("qwen3_moe")
    predictor = untrained(model, kind)
    prompt = make_prompt(sentences=1 if way == "assisted" else 3)
    options: dict[str, Any] = {
        "greedy": {},
        "sampling": {"do_sample": True},
        "beams": {"num_beams": 4, "num_return_sequences": 2},
        "no cache": {"use_cache": False},
        "assisted": {"assistant_model": make_family("qwen3_moe", seed=1)},
    }[way]
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    torch.manual_seed(4)
    with sida.offload(model, memory=1.0) as off:
        expected = off.model.generate(**prompt, **options)
    torch.manual_seed(4)
    with (
        sida.offload(model, memory=0.3, predictor=predictor) as off,
        watched(off, loaded(predictor, tmp_path)) as passes,
    ):
        assert torch.equal(off.model.generate(**prompt, **options), expected)
        stats = off.stats()
    assert len(passes) == stats["passes"] == stats["tables"] and all(passes)
    assert stats["look_ahead"]["uses"] > 0  # beside the tables


def test_beams_are_reordered() -> None:
    # or the test above would not tell states that stay where they are
    model = make_family("qwen3_moe")
    orders: list[Tensor] = []
    original = transformers.DynamicCache.reorder_cache

    class Noting(transformers.DynamicCache):  # type: ignore[misc]
        def reorder_cache(self, beam_idx: Tensor) -> None:
            orders.append(beam_idx)
            original(self, beam_idx)

    model.generate(
        **make_prompt(),
        do_sample=False,
        num_beams=4,
        max_new_tokens=8,
        past_key_values=Noting(config=model.config),
    )
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders)


def test_a_prompt_in_chunks_is_foretold_in_chunks(tmp_path: Path) -> None:
    model, prompt = make_family("olmoe"), make_prompt()
    predictor = untrained(model)
    tables: list[Any] = []
    with sida.offload(model, memory=0.3, predictor=predictor) as off:
        layer = find_adapter(model).stack().layers[0]
        hook = layer.register_forward_pre_hook(
            lambda *_: tables.append(off._engine.scheduler.current_table())
        )
        off.model.generate(**prompt, do_sample=False, max_new_tokens=1, prefill_chunk_size=4)
        hook.remove()
    whole = loaded(predictor, tmp_path).predict(
        find_adapter(model).embed(prompt["input_ids"]).contiguous(),
        prompt["attention_mask"].to(torch.uint8),
    )
    assert [table.tokens for table in tables] == [12, 12, 3]
    got = torch.cat([torch.tensor(t.probs).view(t.layers, 3, -1, t.candidates) for t in tables], 2)
    wanted = torch.tensor(whole.probs).view(whole.layers, 3, -1, whole.candidates)
    wanted = (find_adapter(model).top_k * wanted).clamp(max=1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_for_and_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    model, prompt = make_family(family), make_prompt()
    prompts = [make_prompt(seed, sentences=8) for seed in range(4)]
    adapter = find_adapter(model)
    predictor = fit_predictor(
        adapter, prompts, steps=60, hidden_size=16, learning_rate=1e-2, progress=False
    )
    assert predictor.kind == "causal_lstm" and predictor.heads == [0, 1]
    scores = predictor.evaluate(model, prompts)
    chance = untrained(model).evaluate(model, prompts)
    assert sum(scores["top3"]) > sum(chance["top3"])
    path = tmp_path / "predictor.safetensors"
    predictor.save(path)
    with sida.offload(model, memory=1.0) as off:
        expected = generate(off.model, prompt)
    for memory in ("1 expert", 0.3):
        with sida.offload(model, memory=memory, predictor=path) as off:
            assert generate(off.model, prompt) == expected
            stats = off.stats()
        assert stats["tables"] == stats["passes"] == 5
        assert stats["prefetches"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_is_read_and_forced_as_the_layer_sees_it(family: str) -> None:
    model = make_family(family)
    adapter, prompt = find_adapter(model), {"input_ids": make_prompt()["input_ids"]}
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def note(layer: int) -> Any:
        return lambda m, i, output: found.update({layer: adapter.routing(layer, output)})

    def logits() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(**prompt).logits
        return out

    hooks = [r.register_forward_hook(note(i)) for i, r in enumerate(adapter.routers())]
    expected = logits()
    for hook in hooks:
        hook.remove()
    same = {layer: (ids, weights) for layer, (_, ids, weights) in found.items()}
    with adapter.forced_routing(same):
        torch.testing.assert_close(logits(), expected)
    for other in (lambda ids: (ids + 1) % adapter.num_experts, lambda ids: ids * 0 - 1):
        with adapter.forced_routing({i: (other(ids), w) for i, (ids, w) in same.items()}):
            assert (logits() - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(), expected)
    values, ids, weights = found[0]
    assert values.shape == (27, adapter.num_experts)
    assert ids.shape == weights.shape == (27, adapter.top_k)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 40},
    "beams": {"max_new_tokens": 16, "num_beams": 3},
    "assisted": {"max_new_tokens": 20, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_trained_predictor_brings_experts_that_a_cache_alone_misses(way: str) -> None:
    folder = Path(__file__).parents[2] / "models" / "texts-olmoe-32"
    model = transformers.OlmoeForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("[END]Psalms 151", return_tensors="pt")
    misses, tokens = {}, {}
    for predictor in (folder / "predictor.safetensors", False):
        with sida.offload(model, memory=0.25, predictor=predictor) as off, torch.no_grad():
            tokens[predictor is False] = off.model.generate(**prompt, do_sample=False, **WAYS[way])
            misses[predictor is False] = off.stats()["misses"]
            assert off.stats()["tables"] == (0 if predictor is False else off.stats()["passes"])
    assert torch.equal(tokens[False], tokens[True])
    assert misses[False] < 0.7 * misses[True]


def test_states_go_with_their_cache() -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    with sida.offload(model, memory=0.3, predictor=untrained(model)) as off, torch.no_grad():
        cache = off.model(**prompt, use_cache=True).past_key_values
        kept = [layer for layer in cache.layers if isinstance(layer, PredictorStates)]
        assert [layer.states.shape for layer in kept] == [(3, 9, 65)]
        alive = weakref.ref(kept[0])
        del cache, kept
        gc.collect()
        assert alive() is None
        generate(off.model, prompt)
        gc.collect()
        assert not [o for o in gc.get_objects() if isinstance(o, PredictorStates)]


def test_a_cache_filled_elsewhere_is_not_guessed_at() -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    rest = {
        "input_ids": torch.full((3, 1), 5),
        "attention_mask": torch.cat([prompt["attention_mask"], torch.ones(3, 1).long()], 1),
    }
    with torch.no_grad():
        cache = model(**prompt, use_cache=True).past_key_values
        with sida.offload(model, memory=0.3, predictor=untrained(model)) as off:
            off.model(**rest, past_key_values=cache, use_cache=True)
            stats = off.stats()
            assert stats["passes"] == 1 and stats["tables"] == 0
            assert stats["look_ahead"]["uses"] > 0
            assert not any(isinstance(layer, PredictorStates) for layer in cache.layers)


def test_other_caches_have_look_ahead_instead() -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    options = {"do_sample": False, "max_new_tokens": 5, "cache_implementation": "static"}
    expected = model.generate(**prompt, **options)
    with sida.offload(model, memory=0.3, predictor=untrained(model)) as off:
        assert torch.equal(off.model.generate(**prompt, **options), expected)
        stats = off.stats()
    assert stats["tables"] == 1 and stats["passes"] == 5
    assert stats["look_ahead"]["uses"] > 0


def test_a_pass_that_fails_leaves_no_states_behind() -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    failing = model.model.layers[1].register_forward_pre_hook(_fail)
    cache = transformers.DynamicCache(config=model.config)
    with sida.offload(model, memory=0.3, predictor=untrained(model)) as off, torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            off.model(**prompt, past_key_values=cache, use_cache=True)
        failing.remove()
        assert not any(isinstance(layer, PredictorStates) for layer in cache.layers)
        with sida.offload(make_family("mixtral", seed=1), memory=0.3):
            generate(off.model, prompt)
        assert off.stats()["tables"] == 6


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


@contextmanager
def no_router_runs(model: Any) -> Iterator[None]:
    """Fails where a router computes, but for what tells the form of its output."""
    kind = type(find_adapter(model).routers()[0])
    original = kind.forward

    def check(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden.shape == (1, 32) and not hidden.any(), "a router ran"
        return original(self, hidden, *args, **kwargs)

    kind.forward = check
    try:
        yield
    finally:
        kind.forward = original


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_routing_is_the_predictors(family: str, kind: str, tmp_path: Path) -> None:
    model, prompt = make_family(family), make_prompt()
    adapter, predictor = find_adapter(model), untrained(model, kind)
    named = predictor.predict(
        adapter.embed(prompt["input_ids"]), prompt["attention_mask"], adapter.top_k
    )
    tables = {
        layer: (named.ids[head].flatten(0, 1), named.scale[head].flatten(0, 1))
        for head, layer in enumerate(predictor.heads)
    }
    tokens = prompt["attention_mask"] == 1
    with torch.no_grad(), adapter.forced_routing(tables):
        expected = model(**prompt).logits[tokens]
    with torch.no_grad():
        exact = model(**prompt).logits[tokens]
    options: dict[str, Any] = {"routing": "predicted", "predictor": predictor}
    outputs = []
    with no_router_runs(model), torch.no_grad():
        for memory in ("1 expert", 0.3, 1.0):
            with sida.offload(model, memory=memory, **options) as off:
                outputs.append(off.model(**prompt).logits[tokens])
                stats = off.stats()
                assert stats["predicted_layers"] == adapter.layer_names
                assert [layer["predicted_calls"] for layer in stats["layers"]] == [1, 1]
    assert relative(outputs[0], expected) <= 1e-5 < 1e-3 < relative(exact, expected)
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits[tokens], exact)  # routers choose again


@pytest.mark.parametrize("way", ["greedy", "beams", "assisted", "chunks"])
def test_predicted_routing_goes_on_from_token_to_token(way: str) -> None:
    model = make_family("qwen3_moe")
    predictor = untrained(model)
    prompt = make_prompt(sentences=1 if way == "assisted" else 3)
    more: dict[str, Any] = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "assisted": {"assistant_model": make_family("qwen3_moe", seed=1)},
        "chunks": {"prefill_chunk_size": 4},
    }[way]
    options = {"do_sample": False, "max_new_tokens": 6}
    tokens = []
    for memory, used in ((1.0, {**options, **more}), (0.3, {**options, **more})):
        with sida.offload(model, memory=memory, routing="predicted", predictor=predictor) as off:
            tokens.append(off.model.generate(**prompt, **used))
            stats = off.stats()
            assert stats["tables"] == stats["passes"]
            if way in ("greedy", "chunks"):  # the same whole sequence at once foretells the same
                again = off.model.generate(**prompt, **options, use_cache=False)
                assert torch.equal(again, tokens[-1])
    assert torch.equal(*tokens)


def test_predicted_routing_without_a_table_is_said() -> None:
    model, prompt = make_family("mixtral"), make_prompt()
    options = {"do_sample": False, "max_new_tokens": 3, "cache_implementation": "static"}
    with sida.offload(model, memory=0.3, routing="predicted", predictor=untrained(model)) as off:
        with pytest.raises(RuntimeError, match=r"no hash table.*DynamicCache.*routing=\"exact\""):
            off.model.generate(**prompt, **options)
        assert generate(off.model, prompt)


def test_mapped_prompts_have_tables_built_ahead() -> None:
    model = make_family("mixtral")
    prompts = [make_prompt(seed) for seed in range(4)]
    with sida.offload(model, memory=1.0) as off:
        expected = [out.logits for out in off.map(prompts)]
    with sida.offload(model, memory=0.3, predictor=untrained(model)) as off:
        got = [out.logits for out in off.map(prompts)]
        assert off.stats()["tables"] == 4
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_cannot_foretell_a_decoder_is_refused(tmp_path: Path) -> None:
    model = make_family("mixtral")
    for kind in ("lstm", "transformer"):
        with pytest.raises(ValueError, match=f"kind '{kind}' foretells a token from those that"):
            sida.offload(model, memory=0.5, predictor=untrained(model, kind))
    with pytest.raises(ValueError, match="expected kind lstm or token for a decoder"):
        sida.train_predictor(model, [make_prompt()], "transformer", steps=1)
    with pytest.raises(ValueError, match="trained for another model: fingerprint"):
        sida.offload(model, memory=0.5, predictor=untrained(make_family("mixtral", seed=5)))
    with sida.offload(model, memory=0.5) as off:
        generate(off.model, make_prompt())
        recorded = off.record(tmp_path / "table")
    with pytest.raises(ValueError, match="recorded routing foretells an encoder's batches"):
        sida.offload(model, memory=0.5, predictor=recorded)
    assert generate(model, make_prompt())


def test_encoders_keep_the_bidirectional_kind() -> None:
    from switch_models import make_batches

    predictor = fit_predictor(
        find_adapter(make_encoder()), make_batches(1), steps=1, hidden_size=16, progress=False
    )
    assert predictor.kind == "lstm"
