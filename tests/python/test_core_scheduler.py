# SPDX-License-Identifier: Apache-2.0
"""The scheduler from Python: passes, tables built ahead, statistics, traces, recordings."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import moe, random_experts

from sida import ExpertCache, ExpertStore, HashPredictor, HashTable, MoeConfig, OffloadScheduler
from sida._core import OffloadedExperts, batch_key

DATA = Path(__file__).parents[1] / "data"
CONFIG = MoeConfig(layers=2, experts=4, hidden_size=8, intermediate_size=16)
ONE = np.ones((1, 1), np.float32)


def engine(memory: Any = "2 experts", **options: Any) -> tuple[OffloadScheduler, list[Any]]:
    store = ExpertStore.from_arrays(CONFIG, random_experts(CONFIG))
    scheduler = OffloadScheduler(ExpertCache(store, memory, **options))
    return scheduler, [OffloadedExperts(scheduler, i, threads=1) for i in range(CONFIG.layers)]


def table_of(ids: list[list[int]], key: int = 0) -> HashTable:
    """ids[layer][token]: one candidate each, foretold for sure."""
    array = np.array(ids)[:, :, None]
    return HashTable(
        layers=array.shape[0],
        candidates=1,
        keys=[key],
        offsets=[0, array.shape[1]],
        ids=array,
        probs=np.ones(array.shape),
        scale=np.ones(array.shape),
    )


def source_of(*tables: HashTable) -> Callable[[], HashTable | None]:
    rest = iter(tables)
    return lambda: next(rest, None)


def use(layer: Any, *experts: int) -> np.ndarray:
    count = len(experts)
    hidden = np.ones((count, CONFIG.hidden_size), np.float32)
    out: np.ndarray = layer.forward(
        hidden, np.array(experts)[:, None], np.ones((count, 1), np.float32)
    )
    return out


def counts(stats: Any) -> tuple[int, int, int, int]:
    return stats["uses"], stats["hits"], stats["late"], stats["misses"]


def test_statistics_of_a_trace_worked_out_by_hand() -> None:
    scheduler, layers = engine("2 experts", policy="lru")
    slab = CONFIG.slab_bytes
    use(layers[0], 1)  # miss                        resident: 0/1
    use(layers[0], 1)  # hit
    use(layers[0], 1, 2)  # hit, miss                resident: 0/1, 0/2
    use(layers[1], 0)  # miss, evicts one of them    resident: 1/0, ...
    use(layers[1], 0, 0, 0)  # hit: one use of one expert
    stats = scheduler.stats()
    assert counts(stats) == (6, 3, 0, 3)
    assert counts(stats["layers"][0]) == (4, 2, 0, 2)
    assert counts(stats["layers"][1]) == (2, 1, 0, 1)
    assert [layer["calls"] for layer in stats["layers"]] == [3, 2]
    assert stats["loads"] == 3
    assert stats["bytes_moved"] == 3 * slab
    assert stats["prefetches"] == stats["wasted"] == stats["bytes_wasted"] == 0
    assert json.loads(json.dumps(stats)) == stats
    scheduler.reset_stats()
    assert counts(scheduler.stats()) == (0, 0, 0, 0)
    use(layers[1], 0)
    assert counts(scheduler.stats()) == (1, 1, 0, 0)


def test_what_is_foretold_is_late_or_a_hit_but_no_miss() -> None:
    scheduler, layers = engine("2 experts")
    for key in range(5):
        scheduler.begin_pass(table_of([[1, 2], [3, 0]], key), key=key)
        assert scheduler.current_key() == key
        use(layers[0], 1, 2)
        use(layers[1], 3, 0)
        scheduler.end_pass()
    stats = scheduler.stats()
    assert stats["uses"] == 20 == stats["hits"] + stats["late"]
    assert stats["misses"] == 0
    assert stats["passes"] == stats["tables"] == 5
    use(layers[0], 3)
    assert scheduler.stats()["misses"] == 1


def test_a_prefetch_that_nobody_reads_is_wasted() -> None:
    store = ExpertStore.from_arrays(CONFIG, random_experts(CONFIG))
    cache = ExpertCache(store, "7 experts")
    scheduler = OffloadScheduler(cache)
    layers = [OffloadedExperts(scheduler, i) for i in range(2)]
    scheduler.begin_pass(table_of([[1], [3]]))
    use(layers[0], 1)
    while (1, 3) not in cache.resident():
        pass
    use(layers[1], 0)  # not what was foretold
    scheduler.end_pass()
    scheduler.close()
    stats = scheduler.stats()
    assert (stats["wasted"], stats["bytes_wasted"]) == (1, CONFIG.slab_bytes)


def test_tables_come_in_the_order_in_which_they_were_built() -> None:
    scheduler, layers = engine()
    tables = [table_of([[b % 4], [(b + 1) % 4]], key=b + 10) for b in range(6)]
    scheduler.start(source_of(*tables), ahead=2)
    for b in range(6):
        assert scheduler.next_batch()
        current = scheduler.current_table()
        assert current is not None
        assert current.keys == [b + 10] == [scheduler.current_key()]
        assert [bool(layer.has_prediction()) for layer in layers] == [True, True]
        use(layers[0], b % 4)
        use(layers[1], (b + 1) % 4)
        scheduler.end_pass()
        assert scheduler.current_table() is None
    assert not scheduler.next_batch()
    assert not scheduler.next_batch()
    assert scheduler.stats()["misses"] == 0
    with pytest.raises(RuntimeError, match="stop"):
        scheduler.start(source_of())
    scheduler.stop()
    scheduler.stop()
    with pytest.raises(RuntimeError, match="start"):
        scheduler.next_batch()
    scheduler.start(source_of(*tables[:1]))
    assert scheduler.next_batch()


def test_the_queue_holds_the_source_back() -> None:
    scheduler, _ = engine()
    built: list[int] = []
    enough = threading.Event()

    def source() -> HashTable:
        built.append(len(built))
        if len(built) == 3:
            enough.set()
        return table_of([[0], [0]], key=len(built))

    scheduler.start(source, ahead=3)
    assert enough.wait(30)
    for batch in range(20):
        assert len(built) <= batch + 3 + 1
        assert scheduler.next_batch()
    scheduler.close()


def test_what_the_source_raises_comes_to_the_caller_behind_earlier_tables() -> None:
    class Unusual(Exception):
        pass

    def source() -> HashTable:
        if not made:
            made.append(1)
            return table_of([[0], [0]], key=7)
        raise Unusual("no more today")

    made: list[int] = []
    scheduler, layers = engine()
    scheduler.start(source)
    assert scheduler.next_batch()
    with pytest.raises(Unusual, match="no more today"):
        scheduler.next_batch()
    use(layers[0], 1)
    scheduler.stop()
    scheduler.start(source_of())
    assert not scheduler.next_batch()


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (3, TypeError, "expected a HashTable, or None at the end.*int"),
        (table_of([[0]]), ValueError, "2 layers"),
        (table_of([[9], [0]]), ValueError, "9"),
    ],
)
def test_sources_that_give_something_else(
    result: Any, error: type[Exception], message: str
) -> None:
    scheduler, _ = engine()
    scheduler.start(lambda: result)
    with pytest.raises(error, match=message):
        scheduler.next_batch()
    with pytest.raises(error, match=message if error is ValueError else "HashTable"):
        scheduler.begin_pass(result)


def test_a_source_cannot_close_its_own_scheduler() -> None:
    scheduler, _ = engine()
    scheduler.start(lambda: scheduler.close())  # type: ignore[func-returns-value]
    with pytest.raises(RuntimeError, match=r"source|closed"):
        scheduler.next_batch()
    scheduler.close()


def test_a_closed_scheduler_says_so() -> None:
    scheduler, layers = engine()
    use(layers[0], 1)
    scheduler.close()
    scheduler.close()
    for call in (
        lambda: use(layers[0], 1),
        scheduler.next_batch,
        scheduler.begin_pass,
        lambda: scheduler.start(source_of()),
        lambda: scheduler.resize(1.0),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert scheduler.stats()["uses"] == 1


def test_a_recording_is_the_routing_and_serves_as_a_perfect_predictor(tmp_path: Path) -> None:
    scheduler, layers = engine()
    ids = np.arange(4, dtype=np.int64)
    key = batch_key(ids)
    scheduler.begin_pass(key=key, mask=np.array([True, True, True, False]))
    use(layers[0], 0, 1, 2, 3)
    use(layers[1], 3, 3, 1, 0)
    scheduler.end_pass()
    recorded = scheduler.record()
    assert recorded.keys == [key]
    assert recorded.ids[:, :, 0].tolist() == [[0, 1, 2, 3], [3, 3, 1, 0]]
    assert recorded.probs[:, :, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]  # 0: for padding
    recorded.save(tmp_path / "routing.safetensors")

    again, layers = engine()
    again.begin_pass(HashTable.load(tmp_path / "routing.safetensors").find(key), key=key)
    use(layers[0], 0, 1, 2)
    use(layers[1], 3, 3, 1)
    assert again.stats()["misses"] == 0


def test_a_trace_is_a_timeline(tmp_path: Path) -> None:
    scheduler, layers = engine()
    scheduler.start(source_of(table_of([[1], [2]])))
    assert scheduler.next_batch()
    use(layers[0], 1)
    use(layers[1], 3)
    scheduler.end_pass()
    scheduler.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    kinds = " ".join(str(event.get("cat", "")) + str(event["name"]) for event in events)
    for kind in ("compute", "prefetch", "hash building", "pass"):
        assert kind in kinds
    with pytest.raises(OSError, match="nowhere"):
        scheduler.trace(tmp_path / "nowhere" / "trace.json")


def test_a_pipeline_made_by_hand() -> None:
    """Predictor, store, cache, scheduler and layers, as the documentation puts them together."""
    predictor = HashPredictor.load(DATA / "predictor_lstm.safetensors")
    config = MoeConfig(
        layers=predictor.layers,
        experts=predictor.experts,
        hidden_size=predictor.embedding_size,
        intermediate_size=12,
        gated=True,
        activation="silu",
        top_k=2,
    )
    experts = random_experts(config)
    random = np.random.default_rng(0)
    batches = [
        random.normal(size=(2, 5, predictor.embedding_size)).astype(np.float32) for _ in range(6)
    ]
    store = ExpertStore.from_arrays(config, experts)
    scheduler = OffloadScheduler(ExpertCache(store, 0.4))
    layers = [OffloadedExperts(scheduler, i) for i in range(config.layers)]
    waiting = iter(enumerate(batches))

    def build() -> HashTable | None:
        key, batch = next(waiting, (0, None))
        return None if batch is None else predictor.predict(batch, key=key)

    scheduler.start(build, ahead=3)
    for key, batch in enumerate(batches):
        assert scheduler.next_batch()
        assert scheduler.current_key() == key
        table = predictor.predict(batch, key=key)
        hidden = batch.reshape(10, -1)
        for i, layer in enumerate(layers):
            if layer.has_prediction():
                ids, scale = table.ids[i, :, :2], table.scale[i, :, :2]
                out = layer.forward_predicted(hidden)
            else:
                ids = np.argsort(random.random((10, config.experts)), axis=1)[:, :2]
                scale = np.full((10, 2), 0.5, np.float32)
                out = layer.forward(hidden, np.ascontiguousarray(ids), scale)
            expected = moe(config, experts[i], hidden, ids, scale)
            assert np.allclose(out, expected, atol=1e-4)
        scheduler.end_pass()
    assert not scheduler.next_batch()
    stats = scheduler.stats()
    assert stats["hits"] + stats["late"] + stats["misses"] == stats["uses"] > 0
    predicted = [layer["predicted_calls"] for layer in stats["layers"]]
    assert predicted == [6 * (i in predictor.heads) for i in range(config.layers)]
    scheduler.close()


@pytest.mark.parametrize(
    "options", [{"transfer_threads": 0}, {"chunk_bytes": 0}, {"transfer_threads": -1}]
)
def test_options_that_cannot_be_right(options: dict[str, int]) -> None:
    cache = ExpertCache(ExpertStore.from_arrays(CONFIG, random_experts(CONFIG)), 1.0)
    with pytest.raises(ValueError, match="expected"):
        OffloadScheduler(cache, **options)
    with pytest.raises(ValueError, match="ahead"):
        OffloadScheduler(cache).start(source_of(), ahead=0)
