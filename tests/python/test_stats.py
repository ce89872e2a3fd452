# SPDX-License-Identifier: Apache-2.0
"""Counts that add up, and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from switch_models import decoder_inputs, make_batch, make_batches, make_encoder, make_seq2seq, run

import sida
from sida.huggingface import find_adapter
from sida.stats import Stats, size


def routed(model: Any, batch: Any) -> list[set[int]]:
    """Experts of every layer that tokens, not padding, are routed to."""
    adapter, found = find_adapter(model), {}

    def note(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            _, ids, _ = adapter.routing(layer, output)
            kept = ids.flatten()[batch["attention_mask"].flatten() == 1]
            found[layer] = set(kept.tolist()) - {-1}

        return hook

    hooks = [router.register_forward_hook(note(i)) for i, router in enumerate(adapter.routers())]
    run(model, batch)
    for hook in hooks:
        hook.remove()
    return [found[layer] for layer in range(len(adapter.layer_names))]


@pytest.mark.parametrize("memory", ["1 expert", 0.4, 1.0])
@pytest.mark.parametrize("mapped", [False, True])
def test_uses_are_the_experts_of_tokens(memory: Any, mapped: bool) -> None:
    model, batches = make_encoder(), make_batches(3)
    needed = [[len(experts) for experts in routed(model, batch)] for batch in batches]
    with sida.offload(model, memory=memory) as off:
        if mapped:
            list(off.map(batches))
        else:
            for batch in batches:
                run(off.model, batch)
        stats = off.stats()
    by_layer = [sum(counts) for counts in zip(*needed, strict=True)]
    assert [layer["uses"] for layer in stats["layers"]] == by_layer
    assert stats["uses"] == sum(by_layer)
    assert stats["passes"] == 3
    assert stats["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert [layer["calls"] for layer in stats["layers"]] == [3, 3]


def check(stats: Stats) -> None:
    for counts in (stats, *stats["layers"]):
        assert counts["hits"] + counts["late"] + counts["misses"] == counts["uses"]
        assert counts["stall_seconds"] >= 0
        rate = counts["hits"] / counts["uses"] if counts["uses"] else None
        assert counts["hit_rate"] == rate
    for name in ("uses", "hits", "late", "misses", "calls"):
        assert stats[name] == sum(layer[name] for layer in stats["layers"])
    assert stats["bytes_moved"] == stats["loads"] * stats["slot_bytes"]
    assert 0 <= stats["wasted"] <= stats["prefetches"] <= stats["loads"]
    assert 0 <= stats["resident_experts"] <= stats["slots"] <= stats["total_experts"]
    assert stats["resident_bytes"] <= stats["budget_bytes"]
    assert sorted(stats["exact_layers"] + stats["predicted_layers"]) == sorted(
        layer["name"] for layer in stats["layers"]
    )


@pytest.mark.parametrize("memory", ["1 expert", 0.25, 0.5, 1.0])
@pytest.mark.parametrize("policy", ["fifo", "lru", "lfu", "lookahead"])
def test_counts_add_up(memory: Any, policy: str, tmp_path: Path) -> None:
    model, batches = make_encoder(), make_batches(5)
    with sida.offload(model, memory=memory, policy=policy) as off:
        check(off.stats())
        list(off.map(batches))
        check(off.stats())
        assert off.stats()["uses"] > 0
        table = off.record(tmp_path / "table")
    with sida.offload(model, memory=memory, policy=policy, predictor=table) as off:
        list(off.map(batches))
        check(off.stats())
        off.reset_stats()
        stats = off.stats()
        check(stats)
        assert stats["uses"] == stats["loads"] == stats["passes"] == stats["tokens"] == 0
        assert stats["hit_rate"] is None


def test_one_expert_never_hits_and_all_always_do() -> None:
    model, batch = make_encoder(), make_batch()
    with sida.offload(model, memory="1 expert") as off:
        run(off.model, batch)
        assert off.stats()["hits"] == 0 and off.stats()["misses"] == off.stats()["uses"]
    with sida.offload(model, memory=1.0) as off:
        run(off.model, batch)
        assert off.stats()["hit_rate"] == 1.0 and off.stats()["bytes_moved"] == 0


def test_the_second_pass_hits_what_the_first_brought(tmp_path: Path) -> None:
    model = make_encoder(num_layers=2, num_sparse_encoder_layers=1, num_experts=20)
    batch = {**make_batch(), "attention_mask": torch.ones(5, 12, dtype=torch.long)}
    (needed,) = routed(model, batch)
    with sida.offload(model, memory=f"{len(needed)} experts") as off:
        run(off.model, batch)
        first = off.stats()
        assert first["misses"] == first["uses"] == len(needed) < 20
        run(off.model, batch)
        assert off.stats()["hits"] - first["hits"] == first["uses"]


def test_encoder_and_decoder_are_counted() -> None:
    with sida.offload(make_seq2seq(), memory=0.5) as off:
        run(off.model, decoder_inputs(make_batch(), length=4))
        stats = off.stats()
        assert stats["passes"] == 2
        assert stats["tokens"] == int(make_batch()["attention_mask"].sum()) + 5 * 4
        check(stats)


def test_shown_as_json_text_and_html() -> None:
    with sida.offload(make_encoder(), memory=0.5) as off:
        run(off.model, make_batch())
        stats = off.stats()
    assert json.loads(json.dumps(stats)) == stats
    lines = str(stats).splitlines()
    assert lines[0].split() == "layer routing calls uses hits late misses hit rate stall".split()
    assert [line.split()[0] for line in lines[1:4]] == [
        "encoder.block.1.layer.1.mlp",
        "encoder.block.3.layer.1.mlp",
        "all",
    ]
    assert len({len(line) for line in lines[:4]}) == 1  # aligned
    assert "room for 8 of 16 experts: 96.0 KiB" in lines[-1]
    page = stats._repr_html_()
    assert page.count("<tr>") == 4 and "encoder.block.1.layer.1.mlp" in page


def test_nothing_happened_yet_can_be_shown() -> None:
    with sida.offload(make_encoder(), memory=0.5) as off:
        assert " -  " in str(off.stats()) and "<table>" in off.stats()._repr_html_()


def test_trace_is_json_that_names_layers_and_waits(tmp_path: Path) -> None:
    with sida.offload(make_encoder(), memory=0.2) as off:
        list(off.map(make_batches(3)))
        off.trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    assert len(events) > 10


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
