# SPDX-License-Identifier: Apache-2.0
"""The snippets of the README run as they stand there."""

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


def test_every_linked_file_exists() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)\)", prose)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
