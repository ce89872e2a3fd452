# SPDX-License-Identifier: Apache-2.0
"""`forward` with what the families take, against transformers' own output."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_models import FAMILIES, make_family, make_prompt
from switch_models import decoder_inputs, make_batch, make_seq2seq, relative
from torch import Tensor

import sida

MEMORY = 0.25
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Relative L2 distance, by dtype."""


class Family:
    """A model and a batch for it."""

    def __init__(self, name: str) -> None:
        self.model: Any = make_seq2seq() if name == "switch" else make_family(name)
        self.batch = decoder_inputs(make_batch()) if name == "switch" else make_prompt()

    def same(self, *args: Any, limit: float = 1e-5, **kwargs: Any) -> None:
        """Compare all that a call returns."""
        again = copy.deepcopy((args, kwargs))  # a cache among them is written to
        expected = flat(call(self.model, *args, **kwargs))
        with sida.offload(self.model, memory=MEMORY) as off:
            got = flat(call(self.model, *again[0], **again[1]))
            assert off.stats()["uses"] > 0
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            assert relative(got[name], value) <= limit, name


@torch.no_grad()
def call(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def flat(output: Any, name: str = "") -> dict[str, Tensor]:
    """All floating tensors of an output by their place in it."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() else {}
    if isinstance(output, dict):
        items = list(output.items())
    elif isinstance(output, tuple | list):
        items = [(str(place), value) for place, value in enumerate(output)]
    else:
        return {}
    return {k: v for key, value in items for k, v in flat(value, f"{name}/{key}").items()}


@pytest.fixture(scope="module", params=[*FAMILIES, "switch"])
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def takes_router_logits(model: Any) -> bool:
    old = transformers.__version__.startswith("5.17.")
    if old and model.config.model_type in ("switch_transformers", "granitemoe"):
        return False  # transformers fails by itself
    return model.config.is_encoder_decoder or hasattr(model.config, "output_router_logits")


def test_router_logits_and_hidden_states(family: Family) -> None:
    options: dict[str, Any] = {"output_hidden_states": True}
    if takes_router_logits(family.model):
        options["output_router_logits"] = True
    family.same(**family.batch, **options)


def test_attentions(family: Family) -> None:
    used = family.model.config._attn_implementation
    family.model.set_attn_implementation("eager")  # the one that returns them
    family.same(**family.batch, output_attentions=True)
    family.model.set_attn_implementation(used)


def test_embeddings_in_place_of_ids(family: Family) -> None:
    batch = dict(family.batch)
    embed = family.model.get_input_embeddings()
    with torch.no_grad():
        embeddings = embed(batch.pop("input_ids"))
    family.same(**batch, inputs_embeds=embeddings)


INSTEAD = dict.fromkeys(["inputs_embeds", "encoder_outputs", "decoder_inputs_embeds"])
"""Arguments that stand for others, and have tests of their own."""


def test_every_argument_by_position(family: Family) -> None:
    mask, labels = family.batch["attention_mask"], family.batch["input_ids"]
    values = {
        **INSTEAD,
        **family.batch,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "decoder_attention_mask": torch.ones(len(mask), 6),
        "past_key_values": make_cache(family.model),
        "labels": family.batch.get("decoder_input_ids", labels),
        "use_cache": True,
        "output_router_logits": takes_router_logits(family.model),
        "logits_to_keep": 0,
    }
    names = [
        name for name in inspect.signature(family.model.forward).parameters if name != "kwargs"
    ]
    family.same(*(values[name] for name in names))


def test_a_stack_by_position(family: Family) -> None:
    model, arguments = family.model, list(family.batch.values())[:2]
    stack = model.encoder if model.config.is_encoder_decoder else model.model
    expected = call(stack, *arguments).last_hidden_state
    with sida.offload(model, memory=MEMORY, skip_padding=True) as off:
        got = call(stack, *arguments).last_hidden_state
        assert off.stats()["tokens"] == arguments[1].sum()
    tokens = arguments[1].bool()
    assert relative(got[tokens], expected[tokens]) <= 1e-5


def make_cache(model: Any) -> Any:
    cache = transformers.DynamicCache()
    if not model.config.is_encoder_decoder:
        return cache
    return transformers.EncoderDecoderCache(cache, transformers.DynamicCache())


def test_the_last_logits_alone(family: Family) -> None:
    if family.model.config.is_encoder_decoder:
        pytest.skip("Switch returns all logits")
    family.same(**family.batch, logits_to_keep=2)


def test_an_encoder_that_ran_before() -> None:
    family = Family("switch")
    embed = family.model.get_input_embeddings()
    with torch.no_grad():
        embeddings = embed(family.batch.pop("decoder_input_ids"))
    encoded = call(family.model.encoder, **family.batch)
    mask = family.batch["attention_mask"]
    family.same(attention_mask=mask, encoder_outputs=encoded, decoder_inputs_embeds=embeddings)


def test_labels_and_a_tuple(family: Family) -> None:
    labels = family.batch.get("decoder_input_ids", family.batch["input_ids"])
    family.same(**family.batch, labels=labels, return_dict=False)


def test_packed_sequences(family: Family) -> None:
    if family.model.config.is_encoder_decoder:
        pytest.skip("Switch has no positions to pack by")
    ids = make_prompt(seed=2, sentences=1, length=12)["input_ids"].clamp(min=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    family.same(input_ids=ids, position_ids=positions, use_cache=False)
    sequence = torch.tensor([0] * 7 + [1] * 5)
    mask = (sequence[:, None] == sequence).tril()[None, None]
    family.same(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)


def test_continued_from_a_cache(family: Family) -> None:
    if family.model.config.is_encoder_decoder:
        pytest.skip("generate's tests continue decoders of Switch")
    prompt = family.batch

    def continued() -> Tensor:
        first = call(family.model, **{k: v[:, :6] for k, v in prompt.items()}, use_cache=True)
        rest = call(
            family.model,
            input_ids=prompt["input_ids"][:, 6:],
            attention_mask=prompt["attention_mask"],
            past_key_values=first.past_key_values,
        )
        logits: Tensor = rest.logits
        return logits

    expected = continued()
    with sida.offload(family.model, memory=MEMORY):
        assert relative(continued(), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*FAMILIES, "switch"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    family = Family(name)
    reference = flat(call(family.model, **family.batch))["/logits"]
    family.model.to(dtype)
    own = relative(flat(call(family.model, **family.batch))["/logits"], reference)
    with sida.offload(family.model, memory=MEMORY):
        got = flat(call(family.model, **family.batch))["/logits"]
    assert got.dtype == dtype
    # all layers of the model round: no farther from float32 than transformers is by itself
    assert relative(got, reference) <= max(1.25 * own, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*FAMILIES, "switch"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    family = Family(name)
    reference = flat(call(family.model, **family.batch))["/logits"]
    with torch.autocast("cpu", dtype):
        expected = flat(call(family.model, **family.batch))["/logits"]
        with sida.offload(family.model, memory=MEMORY):
            got = flat(call(family.model, **family.batch))["/logits"]
    assert got.dtype == expected.dtype
    assert relative(got, reference) <= max(1.25 * relative(expected, reference), LIMITS[dtype])


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_another_dtype_than_the_rest(name: str) -> None:
    family = Family(name)
    reference = flat(call(family.model, **family.batch))["/logits"]
    for part, module in family.model.named_modules():
        if part.endswith(".experts"):
            module.to(torch.bfloat16)
    expected = flat(call(family.model, **family.batch))["/logits"]
    with sida.offload(family.model, memory=MEMORY):
        got = flat(call(family.model, **family.batch))["/logits"]
    assert got.dtype == expected.dtype
    own = relative(expected, reference)
    assert relative(got, reference) <= max(1.25 * own, LIMITS[torch.bfloat16])


@pytest.mark.parametrize("weights_dtype", LIMITS)
@pytest.mark.parametrize("dtype", LIMITS)
def test_a_layer_answers_in_the_dtype_of_its_input(
    dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    model = make_family("mixtral")
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids, weights = torch.arange(12).view(6, 2) % 5, torch.full((6, 2), 0.75, dtype=weights_dtype)
    with sida.offload(model, memory=MEMORY):
        experts = model.model.layers[0].mlp.experts
        got = experts(hidden, ids, weights)
        assert got.dtype == dtype
        assert torch.equal(got, experts(hidden.float(), ids, weights.float()).to(dtype))
