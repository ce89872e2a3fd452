# SPDX-License-Identifier: Apache-2.0
"""Threads: Python's lock is let go of, ends are clean, nothing hangs."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import random_experts

from sida import ExpertCache, ExpertStore, HashTable, MoeConfig, OffloadScheduler
from sida._core import OffloadedExperts

CONFIG = MoeConfig(layers=2, experts=4, hidden_size=8, intermediate_size=16)


def store_of() -> ExpertStore:
    return ExpertStore.from_arrays(CONFIG, random_experts(CONFIG))


def table() -> HashTable:
    one = np.ones((2, 1, 1))
    return HashTable(
        layers=2, candidates=1, keys=[0], offsets=[0, 1], ids=one.astype(int), probs=one, scale=one
    )


def in_time(function: Callable[[], Any], seconds: float = 60) -> None:
    """Fails, rather than hangs, where `function` does not come back."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "did not come back"


def case(tokens: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.ones((tokens, 8), np.float32),
        np.arange(tokens)[:, None] % 4,
        np.ones((tokens, 1), np.float32),
    )


def test_other_threads_run_while_a_layer_waits_for_its_experts() -> None:
    slow = store_of().throttled(bytes_per_second=1e9, latency_seconds=0.25)
    layer = OffloadedExperts(OffloadScheduler(ExpertCache(slow, "1 expert")), 0)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.005)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    layer.forward(*case())
    end = time.monotonic()
    done.set()
    thread.join()
    assert end - begin >= 0.25
    assert sum(begin < t < end for t in ticks) > 5


def test_calls_from_several_threads_take_turns() -> None:
    scheduler = OffloadScheduler(ExpertCache(store_of(), "2 experts"))
    layers = [OffloadedExperts(scheduler, i, threads=2) for i in range(2)]
    random = np.random.default_rng(0)
    cases = [(random.normal(size=(4, 8)).astype(np.float32), *case()[1:]) for _ in range(8)]
    expected = [layers[i % 2].forward(*arguments) for i, arguments in enumerate(cases)]
    failures: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 8, 50):
            if not np.array_equal(layers[i % 2].forward(*cases[i]), expected[i]):
                failures.append(int(i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    stats = scheduler.stats()
    assert stats["hits"] + stats["late"] + stats["misses"] == stats["uses"] == 4 * (200 + 8)


def test_closing_ends_a_wait_for_the_next_batch() -> None:
    release = threading.Event()
    scheduler = OffloadScheduler(ExpertCache(store_of(), "1 expert"))

    def source() -> None:
        release.wait(60)

    outcome: list[object] = []

    def wait() -> None:
        try:
            outcome.append(scheduler.next_batch())
        except RuntimeError as error:
            outcome.append(str(error))

    scheduler.start(source)
    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    waiting.join(30)
    assert not waiting.is_alive()
    assert outcome in ([False], ["the scheduler was closed"])
    release.set()
    closing.join(30)
    assert not closing.is_alive()


def test_closing_ends_a_layer_call_under_way() -> None:
    slow = store_of().throttled(bytes_per_second=1e9, latency_seconds=0.2)
    scheduler = OffloadScheduler(ExpertCache(slow, "1 expert"))
    layer = OffloadedExperts(scheduler, 0)
    errors: list[str] = []

    def call() -> None:
        try:
            while True:
                layer.forward(*case())
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.1)
    in_time(scheduler.close)
    thread.join(30)
    assert not thread.is_alive()
    assert "closed" in errors[0]


def test_made_and_ended_a_hundred_times() -> None:
    before = threading.active_count()

    def work() -> None:
        for i in range(100):
            scheduler = OffloadScheduler(ExpertCache(store_of(), "2 experts"))
            layer = OffloadedExperts(scheduler, i % 2, threads=2)
            scheduler.start(table, ahead=1 + i % 3)
            if i % 2:
                scheduler.next_batch()
            if i % 3:
                layer.forward(*case())
            if i % 5:
                scheduler.close()

    in_time(work, 120)
    gc.collect()
    assert threading.active_count() <= before + 1


def test_a_layer_may_outlive_the_names_of_what_it_needs() -> None:
    layer = OffloadedExperts(OffloadScheduler(ExpertCache(store_of(), "1 expert")), 1)
    gc.collect()
    expected = OffloadedExperts(OffloadScheduler(ExpertCache(store_of(), 1.0)), 1)
    assert np.array_equal(layer.forward(*case()), expected.forward(*case()))


PRELUDE = """
import sys, threading, time
sys.path[:0] = {path!r}
import numpy as np
from test_core_threads import CONFIG, case, store_of, table
from sida import ExpertCache, OffloadScheduler
from sida._core import OffloadedExperts
scheduler = OffloadScheduler(ExpertCache(store_of(), "2 experts"))
layer = OffloadedExperts(scheduler, 0)
"""
EXITS = {
    "tables wait": "scheduler.start(table); scheduler.next_batch()",
    "a source is at work": """
entered = threading.Event()
def source():
    entered.set()
    time.sleep(0.5)
    return table()
scheduler.start(source)
entered.wait()
""",
    "a source never returns": """
entered = threading.Event()
def source():
    entered.set()
    while True:  # asks for Python's lock while the interpreter is being taken down
        time.sleep(0.001)
scheduler.start(source)
entered.wait()
""",
    "prefetches are under way": """
slow = store_of().throttled(bytes_per_second=1e9, latency_seconds=0.2)
scheduler = OffloadScheduler(ExpertCache(slow, "2 experts"))
scheduler.begin_pass(table())
""",
    "a daemon thread waits for a batch": """
scheduler.start(lambda: time.sleep(0.5))
threading.Thread(target=scheduler.next_batch, daemon=True).start()
time.sleep(0.1)
""",
    "a daemon thread computes": """
def work():
    while True:
        layer.forward(*case())
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
""",
    "a source holds the scheduler": """
def source(scheduler=scheduler):
    return table()
scheduler.start(source)
del scheduler, layer
""",
    "an exception is on its way": "raise SystemExit(0)",
}


def run(code: str) -> None:
    """In a process of its own: what never lets go of Python's lock cannot be timed out here."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE.format(path=[p for p in sys.path if p]) + code],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr + done.stdout


@pytest.mark.parametrize("name", EXITS)
def test_the_interpreter_ends_with_work_in_flight(name: str) -> None:
    run(EXITS[name])


@pytest.mark.parametrize("end", ["scheduler.close()", "scheduler.stop()", "del scheduler"])
def test_ending_while_a_source_runs(end: str) -> None:
    run(f"""
entered, left = threading.Event(), threading.Event()
def source():
    entered.set()
    time.sleep(0.3)
    left.set()
    return table()
del layer
scheduler.start(source)
entered.wait()
{end}
assert left.is_set()
""")
