# SPDX-License-Identifier: Apache-2.0
"""Seeds of a soak add up over runs in one file (benchmarks/cuda_soak.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import cuda_soak

PROGRAM = """#!{python}
import sys
first = int(sys.argv[sys.argv.index("--first-seed") + 1])
if {status} != 3:
    print('{{"first_seed": %d, "seeds": 7, "right_passes": 70, "seconds": 1.5}}' % first)
if {status} != 0:
    print("soak: seed 8: a pass gave other bits", file=sys.stderr)
sys.exit({status})
"""


@pytest.fixture
def soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cuda_soak, "RECORDED", tmp_path / "recorded.json")

    def run(status: int, file: str = "soak.json") -> tuple[int, dict[str, Any]]:
        program = tmp_path / "program"
        program.write_text(PROGRAM.format(python=sys.executable, status=status))
        program.chmod(0o755)
        command = ["cuda_soak", "--program", str(program), "--json", str(tmp_path / file)]
        monkeypatch.setattr(sys, "argv", command)
        code = cuda_soak.main()
        return code, json.loads((tmp_path / file).read_text())

    return run


def test_a_run_begins_behind_the_seeds_that_were_run(soak: Any) -> None:
    soak(0)
    code, content = soak(0)
    assert code == 0
    assert [run["first_seed"] for run in content["runs"]] == [1, 8]
    assert content["totals"] == {
        "seeds": 14, "right_passes": 140, "seconds": 3.0, "failed_runs": 0
    }  # fmt: skip
    run = content["runs"][-1]
    assert {"date", "command", "device", "driver", "commit", "toolkit"} <= set(run)


def test_runs_go_on_behind_those_that_are_committed(soak: Any) -> None:
    soak(0, "recorded.json")
    assert [run["first_seed"] for run in soak(0)[1]["runs"]] == [1, 8]


def test_a_run_that_fails_is_kept_with_its_seed_which_is_tried_again(soak: Any) -> None:
    code, content = soak(1)
    assert code == 1
    assert content["totals"]["failed_runs"] == 1
    assert content["totals"]["seeds"] == 7  # those before it
    assert content["runs"][0]["failed"] == "soak: seed 8: a pass gave other bits"
    assert soak(0)[1]["runs"][1]["first_seed"] == 8


def test_of_a_run_that_tells_nothing_all_seeds_are_tried_again(soak: Any) -> None:
    assert soak(3)[1]["runs"][0]["seeds"] == 0
    assert soak(0)[1]["runs"][1]["first_seed"] == 1


def test_nothing_is_recorded_without_a_gpu(soak: Any) -> None:
    with pytest.raises(SystemExit, match="GPU"):
        soak(cuda_soak.NO_GPU)
