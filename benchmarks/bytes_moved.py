# SPDX-License-Identifier: Apache-2.0
"""Bytes that are moved on recorded routing, wasted ones included, against offline Belady.

`sida.replay` takes the routing in benchmarks/traces through the scheduler's own decisions in
imagined time: nothing is timed, and a busy machine gives the same figures. The link is finite:
over an infinite one every expert would arrive at once, and no prefetch could come too early.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import harness

import sida
from sida.cli.replay import Recording, load_recording

FOLDER = harness.ROOT / "benchmarks" / "traces"
MODEL = "wordnet-switch-32"
"""The trace of a real model, with tables of its own trained predictor."""
TRACES = (MODEL, "wordnet-probe-32", "wordnet-probe-128")
SENTENCES = (1, 8)
"""Of a batch."""
MEMORY = ("10%", "20%", "50%")
SHARES = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90)
"""Percent of the experts, for plots."""
POLICIES = ("fifo", "lru", "lfu", "lookahead")
AHEAD = 16
LINK = 1e9
LINKS = (0.1e9, 0.25e9, 0.5e9, 1e9, 2e9, 5e9, 20e9)
LAYER_SECONDS = 1e-3
AT_MOST = {"recorded": 1.10, "predictor": 1.50}

_TRACE = f"benchmarks/traces/{MODEL}"
SHOWN = {
    "inspect": f"sida inspect models/{MODEL} --dtype f32",
    "replay": f"sida replay {_TRACE}.safetensors --foretold {_TRACE}.foretold.safetensors "
    "--ahead 0,1,16 --bandwidth 1GB/s",
    "policies": f"sida replay {_TRACE}.safetensors --policy fifo,lru,lfu,auto --ahead 0",
}
"""Commands whose output docs/choosing-a-budget.md shows."""


@dataclass(frozen=True)
class Case:
    """A trace in batches of some sentences, and what a predictor foretold of it."""

    trace: str
    sentences: int
    recording: Recording
    predictor: sida.HashTable

    def replay(
        self,
        memory: str,
        *,
        tables: str = "recorded",
        policy: str = "auto",
        ahead: int = AHEAD,
        link: float = LINK,
    ) -> dict[str, Any]:
        """Return what `sida.replay` does, and `ratio`: bytes moved to Belady's."""
        found = sida.replay(
            self.recording.routing,
            self.predictor if tables == "predictor" else None,
            experts=self.recording.experts,
            expert_bytes=self.recording.expert_bytes,
            memory=memory,
            policy=policy,
            ahead=0 if tables == "none" else ahead,
            bytes_per_second=link,
            layer_seconds=LAYER_SECONDS,
        )
        found["ratio"] = round(found["bytes_moved"] / found["belady_bytes"], 4)
        return found


def load_cases() -> list[Case]:
    """Read every trace, sentence by sentence and in batches."""
    cases = []
    for trace, sentences in itertools.product(TRACES, SENTENCES):
        recording = load_recording(FOLDER / f"{trace}.safetensors")
        predictor = sida.HashTable.load(FOLDER / f"{trace}.foretold.safetensors")
        routing = batched(recording.routing, sentences)
        cases.append(
            Case(
                trace, sentences, replace(recording, routing=routing), batched(predictor, sentences)
            )
        )
    return cases


def batched(table: sida.HashTable, sentences: int) -> sida.HashTable:
    """Put sentences that stand one behind the other into batches."""
    return sida.HashTable(
        layers=table.layers,
        candidates=table.candidates,
        keys=table.keys[::sentences],
        offsets=[*table.offsets[:-1:sentences], table.offsets[-1]],
        ids=table.ids,
        probs=table.probs,
        scale=table.scale,
    )


def row(case: Case, memory: str) -> dict[str, Any]:
    """Policy auto with tables as good as can be, a predictor's, fewer of them, and none."""
    recorded = case.replay(memory)
    predictor = case.replay(memory, tables="predictor")
    return {
        **_place(case, memory),
        "experts": recorded["slots"],
        "Belady, MB": round(recorded["belady_bytes"] / 1e6, 1),
        "recorded": recorded["ratio"],
        "predictor": predictor["ratio"],
        "of which wasted": round(predictor["bytes_wasted"] / predictor["belady_bytes"], 4),
        "recorded, 4 ahead": case.replay(memory, ahead=4)["ratio"],
        "recorded, 1 ahead": case.replay(memory, ahead=1)["ratio"],
        "no tables": case.replay(memory, tables="none")["ratio"],
    }


def policy_row(case: Case, memory: str) -> dict[str, Any]:
    """Every policy, without tables and with the recorded ones."""
    return {
        **_place(case, memory),
        **{
            f"{policy}, {tables}": case.replay(memory, tables=tables, policy=policy)["ratio"]
            for tables, policy in itertools.product(("none", "recorded"), POLICIES)
        },
    }


def curves(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """What docs/choosing-a-budget.md plots: bytes and stall of every budget."""
    ways = [("none", policy) for policy in ("fifo", "lru", "lfu")]
    ways += [(tables, "auto") for tables in ("none", "predictor", "recorded")]
    found = []
    for case, (tables, policy) in itertools.product(cases, ways):
        replays = [case.replay(f"{share}%", tables=tables, policy=policy) for share in SHARES]
        found.append(
            {
                "trace": case.trace,
                "sentences": case.sentences,
                "tables": tables,
                "policy": policy,
                "share": list(SHARES),
                "moved": [each["bytes_moved"] // each["passes"] for each in replays],
                "belady": [each["belady_bytes"] // each["passes"] for each in replays],
                "stall_seconds": [
                    round(each["stall_seconds"] / each["passes"], 7) for each in replays
                ],
            }
        )
    return found


def worst_of_links(cases: Iterable[Case]) -> dict[str, float]:
    """The largest ratio over any link: recorded tables, the trained predictor's, the probes'."""
    worst = {"recorded": 0.0, "predictor": 0.0, "probes": 0.0}
    for case, memory, link in itertools.product(cases, MEMORY, LINKS):
        for tables in ("recorded", "predictor"):
            is_probe = tables == "predictor" and case.trace != MODEL
            name = "probes" if is_probe else tables
            worst[name] = max(worst[name], case.replay(memory, tables=tables, link=link)["ratio"])
    return worst


def targets(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of what was promised."""
    found = []
    for (tables, at_most), sentences in itertools.product(AT_MOST.items(), SENTENCES):
        traces = TRACES if tables == "recorded" else (MODEL,)
        what = "the recorded tables" if tables == "recorded" else "the trained predictor"
        batch = "single sentences" if sentences == 1 else f"batches of {sentences}"
        ratios = [r[tables] for r in rows if r["trace"] in traces and r["batch"] == sentences]
        found.append(
            harness.target(
                f"bytes moved / offline Belady's with {what}, {batch}, worst of {len(ratios)}",
                max(ratios),
                at_most=at_most,
            )
        )
    return found


def output_of(command: str) -> str:
    """Return what a command prints on a terminal of 100 columns."""
    done = subprocess.run(
        shlex.split(command),
        cwd=harness.ROOT,
        env={**os.environ, "COLUMNS": "100"},
        check=True,
        capture_output=True,
        text=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip()


def measure() -> dict[str, Any]:
    """Return bytes moved against Belady's."""
    cases = load_cases()
    rows = [row(case, memory) for case, memory in itertools.product(cases, MEMORY)]
    return {
        "bytes_per_second": LINK,
        "layer_seconds": LAYER_SECONDS,
        "ahead": AHEAD,
        "rows": rows,
        "policies": [policy_row(case, memory) for case in cases for memory in MEMORY],
        "links": {"bytes_per_second": list(LINKS), "worst": worst_of_links(cases)},
        "curves": curves(cases),
        "shown": {
            name: {"command": command, "output": output_of(command)}
            for name, command in SHOWN.items()
        },
        "targets": targets(rows),
    }


def _place(case: Case, memory: str) -> dict[str, Any]:
    return {"trace": case.trace, "batch": case.sentences, "memory": memory}


def main() -> None:
    """Run the command line."""
    options = harness.arguments(__doc__).parse_args()
    harness.run("bytes_moved", options, measure, timed=False)


if __name__ == "__main__":
    main()
