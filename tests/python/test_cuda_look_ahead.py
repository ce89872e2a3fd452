# SPDX-License-Identifier: Apache-2.0
"""Look-ahead on a GPU, where a kernel asks the next layer's router."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import generate, make_prompt
from gpu import needs_gpu, on_gpu
from switch_models import decoder_inputs, make_batch, make_seq2seq, relative, run
from test_look_ahead import expected_counts, logits, make_deep

import sida
from sida.huggingface.look_ahead import LookAhead

pytestmark = needs_gpu


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers whose next router torch was asked for."""
    layers: list[int] = []
    choose = LookAhead.choose

    def note(self: LookAhead, layer: int, hidden: Any) -> Any:
        layers.append(layer)
        return choose(self, layer, hidden)

    monkeypatch.setattr(LookAhead, "choose", note)
    return layers


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_counts_are_those_of_the_routers_themselves(family: str, asked: list[int]) -> None:
    model, prompt = make_deep(family).to("cuda"), on_gpu(make_prompt(sentences=2, length=4))
    expected = expected_counts(model, prompt)
    with sida.offload(model, memory=0.5, device="cuda") as off:
        compared = 0
        for _ in range(3):
            off.reset_stats()
            logits(off.model, prompt)
            stats = off.stats()
            for layer, counts in zip(stats["layers"][1:], expected[1:], strict=True):
                ahead = layer["look_ahead"]
                if ahead["uses"] == 0:  # the guess was not there in time
                    continue
                names = ("uses", "foretold", "foretold_uses")
                assert tuple(ahead[name] for name in names) == counts
                compared += 1
        assert compared > 0 and stats["look_ahead"]["off"] == []
    assert asked == []


def test_a_prompt_of_many_tokens_asks_torch(asked: list[int]) -> None:
    model, prompt = make_deep("qwen3_moe").to("cuda"), on_gpu(make_prompt(sentences=8))
    with sida.offload(model, memory=0.5, device="cuda") as off:
        logits(off.model, prompt)
        assert off.stats()["look_ahead"]["foretold"] > 0
    assert len(asked) > 0


def test_same_tokens_while_weights_of_routers_change(asked: list[int]) -> None:
    model, prompt = make_deep("olmoe").to("cuda"), on_gpu(make_prompt(sentences=1, length=3))
    gates = [m for n, m in model.named_modules() if n.endswith(".gate")]
    with sida.offload(model, memory=1.0, device="cuda") as off:
        first = generate(off.model, prompt)
    with sida.offload(model, memory=0.3, device="cuda") as off:
        assert generate(off.model, prompt) == first
        for gate in gates:
            gate.weight = torch.nn.Parameter(gate.weight.detach().roll(1, 0))
        torch.cuda.empty_cache()  # nobody else's use of what the weights were in
        changed = generate(off.model, prompt)
        assert off.stats()["look_ahead"]["foretold"] > 0
    with sida.offload(model, memory=1.0, device="cuda") as off:
        assert generate(off.model, prompt) == changed
    assert asked == []


def test_the_decoder_of_switch_asks_the_kernel(asked: list[int]) -> None:
    model = make_seq2seq(num_decoder_layers=4, num_sparse_decoder_layers=4).to("cuda")
    inputs = on_gpu(decoder_inputs(make_batch(sentences=2), length=3))
    expected = run(model, inputs)
    with sida.offload(model, memory=0.3, device="cuda") as off:
        assert relative(run(off.model, inputs), expected) <= 1e-5
        assert off.stats()["look_ahead"]["foretold"] > 0
    assert asked == []
