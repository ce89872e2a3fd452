# SPDX-License-Identifier: Apache-2.0
"""The snippets of the README run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", snippets("python"))
def test_python_snippet(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("code", snippets("cpp"))
def test_cpp_snippet(code: str, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    (tmp_path / "app.cpp").write_text(code, encoding="utf-8")
    cmake = "\n".join(snippets("cmake"))
    cmake = cmake.replace(
        "find_package(sida REQUIRED)", f"add_subdirectory({ROOT} sida)\nadd_executable(app app.cpp)"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.25)\nproject(app CXX)\n{cmake}", encoding="utf-8"
    )
    subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "build"], check=True, capture_output=True
    )
    subprocess.run(
        ["cmake", "--build", tmp_path / "build", "--target", "app"], check=True, timeout=300
    )
    subprocess.run([tmp_path / "build" / "app"], check=True, cwd=ROOT, timeout=60)


def test_every_command_exists() -> None:
    from sida.cli.app import app

    known = {command.name for command in app.registered_commands}
    named = set(re.findall(r"`sida ([a-z-]+)", README))
    assert named == known
    scripts = set(re.findall(r"\bscripts/[a-z-]+", README))
    assert {"scripts/demo", "scripts/test"} <= scripts
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)


def test_the_programs_are_as_short_as_they_promise() -> None:
    examples = ROOT / "examples" / "cpp"
    program = (examples / "run_checkpoint.cpp").read_text(encoding="utf-8")
    assert len(program.splitlines()) < 100
    assert re.findall('#include "(.*)"', program) == ["sida/io.hpp", "sida/sida.hpp"]
    policy = (examples / "own_policy.cpp").read_text(encoding="utf-8")
    own = re.findall(r"^class .*?^static_assert.*?$", policy, flags=re.MULTILINE | re.DOTALL)
    assert len(own) == 1 and len(own[0].splitlines()) < 30


def test_every_linked_file_exists() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", prose)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
