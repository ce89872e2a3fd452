# SPDX-License-Identifier: Apache-2.0
"""The ways in which the demonstration runs the same sentences, and what is measured of each."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sida.cli.classifier import Classifier, be_quiet, load_encoder, token_count
from sida.cli.locate import Sentence
from sida.huggingface import Offloaded, from_pretrained, offload

ROUND = 16
"""Batches of a round."""


@dataclass(frozen=True)
class Way:
    """One way of running a model.

    Attributes:
        name: For people.
        memory: What experts may take; None: all of them, where transformers loads them.
        routing: "exact" or "predicted".
    """

    name: str
    memory: str | None
    routing: str


@dataclass(frozen=True)
class Run:
    """What one way gave and what it took."""

    way: Way
    logits: np.ndarray[Any, np.dtype[np.float32]]
    """[sentences, classes]."""
    latencies: list[float]
    """Seconds from one batch's result to the next's."""
    tokens: int
    """Without padding."""
    stats: dict[str, Any]
    """`Offloaded.stats()`."""
    peak_bytes: int
    """Most memory that the process ever had, Python and torch included."""
    trace: list[dict[str, Any]]
    """Events of the trace, times in microseconds."""

    @property
    def seconds(self) -> float:
        """How long all batches took."""
        return sum(self.latencies)


def three_ways(memory: str) -> list[Way]:
    """Return all resident, exact under a budget, and predicted under the same budget."""
    return [
        Way("all resident", None, "exact"),
        Way("exact", memory, "exact"),
        Way("predicted", memory, "predicted"),
    ]


def open_way(model: Path, way: Way) -> Offloaded:
    """Return the handle on which a way runs.

    All resident: loaded by transformers, computed by sida where the weights are. Under a budget:
    the experts are never loaded, and read from the checkpoint as they are needed.
    """
    if way.memory is None:
        return offload(load_encoder(model), memory=1.0)
    predictor = model / "predictor.safetensors"
    off = from_pretrained(model, memory=way.memory, routing=way.routing, predictor=predictor)
    off.model.eval()
    return off


def run_way(
    model: Path, way: Way, sentences: Sequence[Sentence], batch_size: int
) -> Generator[None, None, Run]:
    """Run a classifier over sentences one way, in rounds, and return what it gave and took.

    Yields after loading and a first batch, neither of which counts, and after each round, so that
    several ways can take turns: whatever else the machine does then slows each of them alike.

    Args:
        model: The classifier's folder.
        way: How.
        sentences: What to classify.
        batch_size: Sentences at a time.
    """
    be_quiet()
    classifier = Classifier(model)
    batches = classifier.batches(sentences, batch_size)
    logits, latencies = [], []
    with open_way(model, way) as off:
        for _ in off.map(batches[:1], classifier):
            pass
        off.reset_stats()
        for begin in range(0, len(batches), ROUND):
            yield
            last = time.perf_counter()
            for output in off.map(batches[begin : begin + ROUND], classifier):
                now = time.perf_counter()
                latencies.append(now - last)
                logits.append(output)
                last = now
        stats = dict(off.stats())
        trace = read_trace(off)
    return Run(
        way=way,
        logits=torch.cat(logits).numpy(),
        latencies=latencies,
        tokens=token_count(batches),
        stats=stats,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        trace=trace,
    )


def rounds(sentences: int, batch_size: int) -> int:
    """Return in how many rounds `run_way` goes through sentences."""
    return -(-sentences // (batch_size * ROUND))


def read_trace(off: Offloaded) -> list[dict[str, Any]]:
    """Return the events of a handle's trace: `cat`, `ts` and `dur` in microseconds, `args`."""
    with tempfile.TemporaryDirectory(prefix="sida-trace-") as folder:
        path = Path(folder) / "trace.json"
        off.trace(path)
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event["ph"] == "X"]


def summary(run: Run, sentences: Sequence[Sentence], reference: Run) -> dict[str, Any]:
    """Return the figures of a run, beside those of the run with all experts resident.

    `accuracy`, `fidelity` (share of sentences with the reference's class), `identical` (whether
    all logits are the reference's to the bit), throughput, latency of a batch, what the cache
    counted, and memory in bytes.
    """
    labels = np.array([sentence.label for sentence in sentences])
    classes = run.logits.argmax(1)
    stats = run.stats
    return {
        "way": run.way.name,
        "memory": run.way.memory or 1.0,
        "routing": run.way.routing,
        "accuracy": float((classes == labels).mean()),
        "fidelity": float((classes == reference.logits.argmax(1)).mean()),
        "identical": bool((run.logits == reference.logits).all()),
        "seconds": run.seconds,
        "sentences_per_second": len(labels) / run.seconds,
        "tokens_per_second": run.tokens / run.seconds,
        "latency_p50_seconds": float(np.percentile(run.latencies, 50)),
        "latency_p95_seconds": float(np.percentile(run.latencies, 95)),
        "hit_rate": stats["hit_rate"],
        "uses": stats["uses"],
        "hits": stats["hits"],
        "late": stats["late"],
        "misses": stats["misses"],
        "stall_seconds": stats["stall_seconds"],
        "bytes_moved": stats["bytes_moved"],
        "experts_resident": stats["slots"],
        "experts_total": stats["total_experts"],
        "expert_bytes": stats["budget_bytes"] + stats["staging_bytes"],
        "process_peak_bytes": run.peak_bytes,
        "layers": [
            {key: layer[key] for key in ("name", "routing", "uses", "hits", "late", "misses")}
            for layer in stats["layers"]
        ],
    }
