# SPDX-License-Identifier: Apache-2.0
"""`generate` in the ways that transformers has, against transformers' own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import FAMILIES, make_family, make_prompt, router_margins
from switch_models import make_batch, make_seq2seq, margins
from torch import Tensor

import sida

MEMORY = 0.25
MARGIN = 2e-5
"""Twenty times what rounding moves a probability by; below it, it may decide."""
WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 4},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


class Family:
    """A model and a prompt."""

    def __init__(self, name: str) -> None:
        self.model: Any = make_seq2seq() if name == "switch" else make_family(name)
        self.prompt = make_batch(sentences=3) if name == "switch" else make_prompt()


@pytest.fixture(scope="module", params=[*FAMILIES, "switch"])
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def tokens(model: Any, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    """Tokens of one way to generate, from the same seed each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        chosen: Tensor = model.generate(
            **prompt, **{"do_sample": False, "max_new_tokens": 5, **options}
        )
    return chosen


def same_where_sure(got: Tensor, expected: Tensor, least: Tensor) -> None:
    """Tokens agree in every sentence but those where rounding may decide; most must be sure."""
    rows = len(expected) // len(least)
    sure = (least > MARGIN).repeat_interleave(rows)
    assert sure.float().mean() > 0.5, f"{int((~sure).sum())} of {len(sure)} left out"
    assert torch.equal(got[sure], expected[sure])


@pytest.mark.parametrize("way", WAYS)
def test_ways(family: Family, way: str) -> None:
    model, prompt, options = family.model, family.prompt, WAYS[way]
    if way == "chunked prefill" and model.config.is_encoder_decoder:
        pytest.skip("encoders read a prompt at once")
    watch = margins if model.config.is_encoder_decoder else router_margins
    with watch(model, len(prompt["input_ids"])) as least:
        expected = tokens(model, prompt, **options)
    with sida.offload(model, memory=MEMORY) as off:
        same_where_sure(tokens(model, prompt, **options), expected, least)
        assert off.stats()["misses"] > 0


@pytest.mark.parametrize("offloaded_assistant", [False, True])
def test_assisted(family: Family, offloaded_assistant: bool) -> None:
    if family.model.config.is_encoder_decoder:
        pytest.skip("its beams and samples are covered; transformers assists decoders")
    model, prompt = family.model, {k: v[:1] for k, v in family.prompt.items()}
    assistant = make_family(model.config.model_type, seed=1)
    with router_margins(model, 1) as least:
        expected = tokens(model, prompt, assistant_model=assistant)
    assert least > MARGIN
    with sida.offload(model, memory=MEMORY), _offloaded(assistant, offloaded_assistant):
        assert torch.equal(tokens(model, prompt, assistant_model=assistant), expected)


@contextmanager
def _offloaded(model: Any, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with sida.offload(model, memory=MEMORY):
        yield


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "switch"])
def test_calls_side_by_side(name: str) -> None:
    model = Family(name).model
    prompts = [
        make_batch(seed, 2, 9) if name == "switch" else make_prompt(seed, 2, 9) for seed in range(6)
    ]
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}]

    def choose(call: int) -> Tensor:
        chosen: Tensor = model.generate(
            **prompts[call % 6], do_sample=False, max_new_tokens=5, **ways[call % 2]
        )
        return chosen

    expected = [choose(call) for call in range(6)]
    with sida.offload(model, memory=MEMORY) as off, ThreadPoolExecutor(4) as pool:
        got = list(pool.map(choose, range(18)))
        stats = off.stats()
    assert all(torch.equal(out, expected[i % 6]) for i, out in enumerate(got))
    assert stats["hits"] + stats["late"] + stats["misses"] == stats["uses"]
