# SPDX-License-Identifier: Apache-2.0
"""The tables of families are what the tests say, and the snippets of docs/families.md run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import own_modules
import support_table
from family_models import MODELS, make_family

from sida.huggingface import adapter

ROOT = support_table.ROOT
PAGE = ROOT / "docs" / "families.md"
TEXT = PAGE.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
NAMES = {"allenai/OLMoE-1B-7B-0924": "olmoe", "ibm-granite/granite-3.1-3b-a800m-base": "granitemoe"}
"""Models of the hub that the page names, and the family of the small ones that stand for them."""


@pytest.fixture(scope="module")
def tests() -> list[str]:
    return support_table.collect()


@pytest.mark.parametrize("page", support_table.PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_tests_say(page: Path, tests: list[str]) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table families -->" in text
    assert support_table.filled(text, tests) == text, "run python tests/python/support_table.py"


def test_every_family_is_tested_in_every_way(tests: list[str]) -> None:
    rows = support_table.support(tests).splitlines()[2:]
    assert len(rows) == len(MODELS)
    assert all(row.count("| yes ") == len(support_table.COLUMNS) for row in rows)


def test_what_no_test_covers_is_not_said_to_work(tests: list[str]) -> None:
    fewer = [name for name in tests if "cuda" not in name or "olmoe" not in name]
    rows = support_table.support(fewer).splitlines()
    (row,) = [row for row in rows if row.startswith("| OLMoE ")]
    assert row.count("| yes ") == len(support_table.COLUMNS) - 1


def make_hub(folder: Path) -> None:
    """A cache of the hub in which small models have the names of large ones."""
    for name, family in NAMES.items():
        model = folder / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / "0123456789"
        made: Any = make_family(family, vocab_size=8000)
        made.save_pretrained(snapshot)
        for file in (ROOT / "models" / "wordnet-switch-32").glob("tokenizer*.json"):
            shutil.copy(file, snapshot)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("0123456789")


def test_snippets_run(tmp_path: Path) -> None:
    assert len(SNIPPETS) == 4
    make_hub(tmp_path)
    code = "\n".join(f"exec({snippet!r}, {{}})" for snippet in SNIPPETS[:3])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr


def test_the_snippet_of_a_module_of_ones_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_registered", [])
    model = torch.nn.Sequential(own_modules.Moe(), own_modules.Moe())
    exec(SNIPPETS[3], {"MyMoe": own_modules.Moe, "model": model, "batch": torch.randn(2, 5, 24)})
    assert [kind.__name__ for kind in adapter._registered] == ["MyAdapter"]


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and all((PAGE.parent / link).exists() for link in links if "://" not in link)
