# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/performance.md and README.md are what benchmarks/results say."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    """Import a module of benchmarks/, which imports others from beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)


report = load("report")


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_page_is_what_the_results_generate(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert report.filled(text, report.load_results()) == text, "run scripts/benchmark --report"


def test_every_block_stands_in_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    assert set(re.findall(r"<!-- ([a-z-]+) -->", pages)) == set(report.BLOCKS)


def test_a_changed_figure_is_seen() -> None:
    results = {
        "cache_lookup": {"seconds": {"alone": {"median": 41e-9, "minimum": 40e-9}}, "targets": []}
    }
    page = "a\n<!-- cache-lookup -->\nold\n<!-- /cache-lookup -->\nb\n"
    assert report.filled(page, results) == (
        "a\n<!-- cache-lookup -->\n"
        "|  | median, ns | minimum, ns |\n| --- | ---: | ---: |\n| alone | 41 | 40 |\n"
        "<!-- /cache-lookup -->\nb\n"
    )


def test_a_missed_target_is_listed() -> None:
    missed = {"what": "time / bound", "figure": 1.5, "at_most": 1.15, "met": False}
    kept = {"what": "times as fast", "figure": 3.0, "at_least": 1.5, "met": True}
    results = {"encoder_cold": {"targets": [missed, kept]}}
    assert report.missed(results) == "- time / bound: 1.5, target ≤ 1.15"
    assert "| times as fast | 3 | ≥ 1.5 | yes |" in report.targets(results)
    assert "| time / bound | 1.5 | ≤ 1.15 | **no** |" in report.targets(results)


def test_recordings_say_where_they_come_from() -> None:
    for path in report.RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        for key in ("commit", "command", "cpu", "cores", "memory_bytes", "kernel", "torch"):
            assert result.get(key), f"{path.name} does not say its {key}"


def test_recordings_on_a_gpu_say_where_they_come_from() -> None:
    for path in report.RESULTS.glob("cuda/*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        for origin in result["runs"] if path.stem == "soak" else [result]:
            for key in ("commit", "command", "date"):
                assert origin.get(key), f"{path.name} does not say its {key}"
            assert "NVIDIA" in str(origin.get("gpu") or origin.get("device")), path.name


def test_batches_of_a_trace_are_its_sentences_in_turn() -> None:
    bytes_moved = load("bytes_moved")
    cases = {(c.trace, c.sentences): c.recording.routing for c in bytes_moved.load_cases()}
    alone, together = cases[bytes_moved.MODEL, 1], cases[bytes_moved.MODEL, 8]
    assert len(alone) == 400 and len(together) == 50
    for batch in (0, 17, 49):
        sentences = [alone.slice(batch * 8 + i).ids for i in range(8)]
        assert (together.slice(batch).ids == np.concatenate(sentences, axis=1)).all()


def test_decoders_on_a_gpu_are_shown_with_what_they_miss() -> None:
    def took(seconds: float) -> dict[str, float]:
        return {"median": seconds, "minimum": seconds / 2}

    few = {**took(0.012), "moving": 0.002, "over_bound": 1.25, "hit_rate": 0.75}
    decoder = {
        "layers": 4,
        "most_used_tenth": 0.35,
        "accelerate": {"token": took(1), "prompt": took(2)},
        "resident": {who: took(0.008) for who in ("sida", "eager", "grouped_mm", "batched_mm")},
        "prompt_resident": {who: took(0.02) for who in ("sida", "eager", "grouped_mm")},
        "alone": {
            part: {who: took(9e-5) for who in ("sida", "grouped_mm", "batched_mm")}
            for part in ("blocks_eager", "experts_eager", "experts_thread")
        },
        "50%": {"resident": took(0.007), "no_prediction": few, "look_ahead": few, "prompt": few},
    }
    target = {"what": "a token, time / (R + M)", "figure": 1.25, "at_most": 1.1, "met": False}
    ways = ("sida", "sida_eager", "grouped_mm", "batched_mm")
    compiled = {
        "accelerate": took(1),
        "resident": {who: took(0.003) for who in ways},
        "25%": {"resident": took(0.004), "no_prediction": few, "look_ahead": few},
    }
    results = {
        "cuda_decoder": {"shapes": {"olmoe": decoder}, "targets": [target]},
        "cuda_compiled_decoder": {"shapes": {"olmoe": compiled}, "targets": [target]},
    }
    blocks = load("report_gpu_decoder").BLOCKS
    page = "".join(block(results) for block in blocks.values())
    same = "8.00 (4.00) | 8.00 (4.00) | 8.00 (4.00) | 8.00 (4.00) | 1000.00 (500.00)"
    assert f"| olmoe, 4 layers, a token | {same} |" in page
    assert "| olmoe, 50%, look-ahead | 75 % | 7.0 | 2.0 | 12.00 (6.00) | 1.25 |" in page
    assert "a prompt of 512 | 20.00 (10.00) | 20.00 (10.00) | 20.00 (10.00) |  |" in page
    assert "| olmoe, experts, calling thread | 90 | 90 | 90 |" in page
    same = "3.00 (1.50) | 3.00 (1.50) | 3.00 (1.50) | 3.00 (1.50) | 1000.00 (500.00)"
    assert f"| olmoe | {same} |" in page
    assert "| olmoe, 25%, look-ahead | 75 % | 4.0 | 2.0 | 12.00 (6.00) | 1.25 |" in page
    assert "has 35 % (olmoe) of its uses" in page and "1 of 1 are missed" in page
    assert "| a token, time / (R + M) | 1.25 | ≤ 1.1 | **no** |" in page


def test_generate_on_a_gpu_is_shown_beside_accelerate() -> None:
    def took(seconds: float, same: float) -> dict[str, float]:
        return {"median": seconds, "minimum": seconds / 2, "same_tokens": same}

    few = {**took(0.25, 0.96), "moving": 0.0123, "hit_rate": 0.75}
    figures = {
        "hugging_face": took(0.5, 1),
        "accelerate": took(1, 1),
        "resident": {**took(0.2, 0.96), "moving": 0.0, "hit_rate": 1.0},
        "no_prediction": few,
        "look_ahead": few,
    }
    target = {"what": "1x128, against accelerate", "figure": 4.0, "at_least": 8, "met": False}
    found = {"share": 0.2, "new_tokens": 16, "shapes": {"1x128": figures}, "targets": [target]}
    shown = report.BLOCKS["gpu-generate"]({"cuda_generate": found})
    assert "| 16 tokens a sentence |" in shown
    same = "250.00 (125.00) | 4.0 | 75 % | 12.3 | 96 % |"
    assert f"| 1 x 128, sida, 20%, without prediction | {same}" in shown
    assert f"| 1 x 128, sida, 20%, look-ahead | {same}" in shown
    assert "| 1 x 128, sida, 100% | 200.00 (100.00) | 5.0 | 100 % | 0.0 | 96 % |" in shown
    assert "| 1 x 128, Hugging Face, 100% | 500.00 (250.00) | 2.0 |  |  | 100 % |" in shown
    assert "| 1 x 128, accelerate, 20% | 1000.00 (500.00) | 1.0 |  |  | 100 % |" in shown
    assert "| 1x128, against accelerate | 4 | ≥ 8 | **no** |" in shown


def test_memory_and_random_work_on_a_gpu_are_shown_with_what_failed() -> None:
    run = {"taken_bytes": 3 << 30, "limit_bytes": 2 << 30, "samples": 900, "kept": False}
    run |= {"shape": [1, 128], "share": 0.2, "longest_gap_seconds": 0.0021}
    memory = {"gpu": {"name": "NVIDIA X"}, "date": "2026-01-02", "commit": "abc", "runs": [run]}
    made_on = {"date": "2026-01-03", "device": "NVIDIA Y", "commit": "0123456789"}
    good = {**made_on, "seeds": 7, "right_passes": 70, "seconds": 1.5}
    bad = {**made_on, "seeds": 0, "right_passes": 0, "failed": "seed 9: other bits"}
    totals = {"seeds": 7, "right_passes": 70, "seconds": 1.5, "failed_runs": 1}
    results = {"cuda_memory": memory, "cuda_soak": {"totals": totals, "runs": [good, bad]}}
    shown = report.BLOCKS["gpu-memory"](results)
    assert "| 1 x 128 | 20% | 3072 | 2048 | 900 | 2.1 | **no** |" in shown
    assert shown.endswith("NVIDIA X, 2026-01-02, commit abc.")
    soak = report.BLOCKS["gpu-soak"](results)
    assert "| 2026-01-03 | NVIDIA Y | 0123456 | 7 | 70 | 2 |  |" in soak
    assert "| 2026-01-03 | NVIDIA Y | 0123456 | 0 | 0 |  | seed 9: other bits |" in soak
    assert "| all |  |  | 7 | 70 | 2 | 1 |" in soak


@pytest.mark.parametrize("name", report.BLOCKS)
def test_a_block_without_results_says_so(name: str) -> None:
    shown = report.BLOCKS[name]({})
    command = r"scripts/gpu \w+" if name.startswith("gpu-") else "scripts/benchmark"
    assert shown == "None." or re.fullmatch(rf"Not recorded yet: `{command}`\.", shown)


def test_what_scripts_gpu_is_told_it_can_do() -> None:
    script = (ROOT / "scripts" / "gpu").read_text(encoding="utf-8")
    labels = re.findall(r"^  ((?:\w+ \| )*\w+)\)", script, re.MULTILINE)
    parts = {part for label in labels for part in label.split(" | ")}
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    told = {
        (page.name, part)
        for page in pages
        for part in re.findall(r"scripts/gpu (\w+)", page.read_text(encoding="utf-8"))
    }
    told |= {
        (name, part)
        for name, block in report.BLOCKS.items()
        for part in re.findall(r"scripts/gpu (\w+)", block({}))
    }
    assert len(told) > 10
    assert {part for _, part in told} <= parts, told


def test_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a block among"):
        report.filled("<!-- nonsense -->\n<!-- /nonsense -->", {})
