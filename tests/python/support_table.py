# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of families in README.md and docs/families.md from the tests that there are.

``python tests/python/support_table.py`` replaces what stands between ``<!-- table NAME -->`` and
``<!-- /table NAME -->`` in those files. A cell says yes where pytest collects a test of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from family_models import FAMILIES, MODELS
from test_experts_classes import OUTSIDE, REFUSED

from sida.huggingface.adapter import WRONG_UPSTREAM

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "families.md")
COLUMNS = {
    "`offload`": "test_families.py::test_offload",
    "`from_pretrained`": "test_families.py::test_from_pretrained",
    "`generate`": "test_generate.py::test_ways",
    "`save_pretrained`": "test_saving.py::test_what_transformers_saves_and_reads",
    "CPU": "test_families.py::test_offload",
    "GPU": "test_cuda_families.py::test_offload_and_from_pretrained",
}
"""What is supported, and the test of it, which has the family among its parameters."""
SWITCH = "SwitchTransformersForConditionalGeneration, SwitchTransformersEncoderModel"
NOTES = {
    "switch": (
        "Switch Transformers",
        "predictors and predicted routing for the encoder, which has no `generate`",
    ),
    "mixtral": ("Mixtral", ""),
    "qwen2_moe": ("Qwen2-MoE", "the shared expert stays resident"),
    "qwen3_moe": ("Qwen3-MoE", ""),
    "olmoe": ("OLMoE", ""),
    "phimoe": ("PhiMoE", ""),
    "granitemoe": ("GraniteMoE", "experts of a layer in one tensor"),
    "deepseek_v2": ("DeepSeek-V2", "shared experts and dense layers stay resident"),
    "deepseek_v3": (
        "DeepSeek-V3",
        "shared experts and dense layers stay resident; fp8 in blocks is dequantised on load",
    ),
    "gpt_oss": (
        "gpt-oss",
        "biases; experts of a layer in one tensor, transposed; MXFP4 is dequantised on load",
    ),
}
"""By model type: what people call the family, and what there is to say of it."""
REASONS = {
    "activation": "an activation that sida does not have",
    "norm": "its experts end in a norm, which sida does not compute",
}


def collect() -> list[str]:
    """Return the names of all tests of the families, as pytest has them."""
    files = sorted({test.partition("::")[0] for test in COLUMNS.values()})
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *(folder / f for f in files)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"pytest collects no tests: {done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def support(tests: Collection[str]) -> str:
    """Return the table of families."""
    rows = []
    for family in MODELS:
        if family not in NOTES:
            raise KeyError(f"expected a name for the family {family} in NOTES of {__file__}")
        name, note = NOTES[family]
        classes = SWITCH if family == "switch" else FAMILIES[family][0]
        cells = ["yes" if _is_tested(test, family, tests) else "" for test in COLUMNS.values()]
        rows.append([name, f"`{classes.replace(', ', '`, `')}`", *cells, note])
    return _table(["family", "tested classes of transformers", *COLUMNS, ""], rows)


def refused() -> str:
    """Return the table of what is refused."""
    rows = [[f"`{name}`", REASONS[word]] for name, word in sorted(REFUSED.items())]
    rows += [[f"`{name}`", "not of transformers' experts interface"] for name in sorted(OUTSIDE)]
    rows += [[f"`{name}`", "transformers routes wrongly in it"] for name in WRONG_UPSTREAM]
    return _table(["class of transformers", "why it is refused"], rows)


def filled(text: str, tests: Collection[str]) -> str:
    """Return a page with its tables as the tests give them."""
    tables = {"families": support(tests), "refused": refused()}
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->\n", f"\n<!-- /table {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(pattern, lambda _, t=begin + table + end: t, text, flags=re.DOTALL)
    return text


def _is_tested(test: str, family: str, tests: Collection[str]) -> bool:
    """Whether among the tests there is one of that name with the family as a parameter."""
    return any(
        name.partition("[")[0].endswith(test) and family in re.split(r"[\[\]-]", name)
        for name in tests
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    found = collect()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
