# SPDX-License-Identifier: Apache-2.0
"""Source archive, wheel, editable install, and C++ projects of strangers, in clean environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from reference import random_experts
from safetensors.numpy import save_file

from sida import MoeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
CPU_ALONE = "--config-settings=cmake.define.SIDA_CUDA=OFF"  # not -C, which pip 23.0 lacks
"""Whatever toolkit there is: what these tests look at is the same with the CUDA part."""
HASTY = tuple(
    f"--config-settings=cmake.define.{setting}"
    for setting in ("CMAKE_CXX_FLAGS_RELEASE=-O0", "CMAKE_UNITY_BUILD=ON")
)
"""Compiles sooner: how fast the module is, is not looked at."""
HEADERS = sorted(str(p.relative_to(ROOT / "include")) for p in ROOT.glob("include/sida/**/*.hpp"))


def run(*command: Any, **options: Any) -> str:
    """What the command prints; fails with all that it said."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"CMAKE_BUILD_PARALLEL_LEVEL": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if shutil.which("ccache"):
        environment["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    fails = options.pop("fails", False)
    environment |= options.pop("env", {})
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
        **options,
    )
    assert (done.returncode != 0) == fails, done.stdout[-8000:]
    return done.stdout


def new_environment(folder: Path) -> Path:
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as git would have it, with a module of another build lying in it."""
    folder = tmp_path_factory.mktemp("source")
    listed = run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z").split("\0")
    for name in listed:
        if name and not name.startswith("models/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "python/sida/_core.cpython-39-x86_64-linux-gnu.so").write_bytes(b"stale")
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "from scikit_build_core.build import build_sdist as b; import sys; b(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=source)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def wheel(sdist: Path, build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, isolated."""
    folder = tmp_path_factory.mktemp("wheel")
    python = new_environment(tmp_path_factory.mktemp("builder"))
    run(
        python,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-w",
        folder,
        f"--config-settings=build-dir={build}",
        CPU_ALONE,
        *HASTY,
        sdist,
    )
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which only the wheel is installed, with its [cpp]."""
    python = new_environment(tmp_path_factory.mktemp("installed"))
    run(python, "-m", "pip", "install", f"sida-moe[cpp] @ {wheel.as_uri()}")
    return python


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MoeConfig(layers=2, experts=4, hidden_size=8, intermediate_size=16)
    tensors = {}
    for layer, experts in enumerate(random_experts(config)):
        for i, (up, down, _, _) in enumerate(experts):
            name = f"encoder.block.{layer}.layer.1.mlp.experts.expert_{i}"
            tensors |= {f"{name}.wi.weight": up, f"{name}.wo.weight": down}
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(tensors, path)
    return path


def test_the_source_archive_holds_what_a_build_needs_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {f"include/{header}" for header in HEADERS}
    assert names >= {"LICENSE", "README.md", "pyproject.toml", "CMakeLists.txt"}
    assert not [n for n in names if n.startswith(("models", "tests", "build")) or n.endswith(".so")]


def test_the_wheel_holds_the_module_its_types_and_the_headers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read("sida_moe-0.1.0.dist-info/METADATA").decode()
    assert names >= {f"sida/include/{header}" for header in HEADERS}
    assert names >= {"sida/py.typed", "sida/_core.pyi", "sida/share/cmake/sida/sidaConfig.cmake"}
    python_files = {str(p.relative_to(ROOT / "python")) for p in ROOT.glob("python/sida/**/*.py")}
    assert names >= python_files
    modules = [name for name in names if name.endswith(".so")]
    assert len(modules) == 1
    assert "cpython-39" not in modules[0]
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"sida", "sida_moe-0.1.0.dist-info"}
    assert "Name: sida-moe\n" in metadata


def test_an_isolated_build_takes_eigen_and_json_from_its_requirements(
    wheel: Path, build: Path
) -> None:
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    found = [x for x in lines if x.startswith(("Eigen3_DIR:", "nlohmann_json_INCLUDE_DIR:"))]
    assert len(found) == 2
    assert all("site-packages" in line for line in found), found


def test_the_package_needs_no_torch(python: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, sys
import numpy as np, sida
assert importlib.util.find_spec("torch") is None
assert importlib.util.find_spec("transformers") is None
random = np.random.default_rng(0)
up, down = random.random((4, 6, 3), np.float32), random.random((4, 3, 6), np.float32)
x, ids = random.random((5, 3), np.float32), random.integers(0, 4, (5, 1))
layer = sida.OffloadedExperts(up, down, gated=False, activation="relu", memory="1 expert")
y = layer(x, ids, np.ones((5, 1), np.float32))
for t, (e,) in enumerate(ids):
    assert np.allclose(y[t], down[e] @ np.maximum(up[e] @ x[t], 0), rtol=1e-5)
print(sida.__version__)
"""
    version = run(python, "-W", "error", "-c", code, cwd=tmp_path).strip()
    assert run(python, "-m", "sida", "--version", cwd=tmp_path).strip() == version
    assert "inspect" in run(python.with_name("sida"), "--help", cwd=tmp_path)


def test_the_command_line_inspects_without_torch(
    python: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert "4" in run(python.with_name("sida"), "inspect", checkpoint, cwd=tmp_path)


def test_python_m_sida_without_a_question(python: Path, tmp_path: Path) -> None:
    said = run(python, "-m", "sida", cwd=tmp_path, fails=True)
    assert "--cmake-dir" in said


def test_types_are_seen_by_who_installs_the_wheel(python: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sida\n"
        "store = sida.ExpertStore.open('x')\n"
        "reveal_type(store.config.slab_bytes)\n"
        "sida.ExpertCache(store)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "mine.py"]
    said = run(*command, cwd=tmp_path, fails=True)
    assert 'Revealed type is "int"' in said.replace("builtins.", "")
    assert 'Missing positional argument "memory"' in said
    assert "Found 1 error" in said


def check_program(program: Path, checkpoint: Path) -> None:
    """Runs run_checkpoint at several budgets: the same sums, within each budget."""
    sums = set()
    for budget, slots in (("1 expert", 1), ("50%", 4), ("100%", 8)):
        lines = run(program, checkpoint, budget, 6, 3).splitlines()
        assert f"; {slots} of 8 are resident at most" in lines[0]
        sums.add(lines[1])
    assert len(sums) == 1
    assert float(sums.pop().rpartition(" ")[2]) > 0
    assert "nowhere" in run(program, "nowhere", fails=True)


def configure_and_build(consumer: str, folder: Path, *options: str) -> Path:
    project = ROOT / "tests" / "consumer" / consumer
    run("cmake", "-S", project, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options)
    run("cmake", "--build", folder)
    return folder / "run_checkpoint"


def test_a_stranger_finds_an_installed_sida(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    plain = ("-G", "Ninja", "-DSIDA_BUILD_TESTS=OFF", "-DSIDA_BUILD_EXAMPLES=OFF")
    run("cmake", "-S", source, "-B", tmp_path / "build", *plain)
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "installed")
    shutil.rmtree(tmp_path / "build")
    prefix = f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"
    check_program(configure_and_build("find_package", tmp_path / "user", prefix), checkpoint)


def test_a_stranger_carries_the_sources(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    where = f"-Dsida_source={source}"
    check_program(configure_and_build("add_subdirectory", tmp_path, where), checkpoint)


def test_a_stranger_finds_sida_in_the_wheel(python: Path, checkpoint: Path, tmp_path: Path) -> None:
    cmake_dir = run(python, "-m", "sida", "--cmake-dir", cwd=tmp_path).strip()
    include_dir = run(python, "-m", "sida", "--include-dir", cwd=tmp_path).strip()
    assert (Path(include_dir) / "sida" / "sida.hpp").is_file()
    program = configure_and_build("wheel", tmp_path, f"-Dsida_DIR={cmake_dir}")
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert f"Eigen3_DIR:PATH={python.parents[1]}" in cache  # the wheel's [cpp], not the system's
    assert f"nlohmann_json_INCLUDE_DIR:PATH={python.parents[1]}" in cache
    check_program(program, checkpoint)


def test_a_project_built_by_scikit_build_core_finds_sida_by_itself(
    python: Path, checkpoint: Path
) -> None:
    run(python, "-m", "pip", "install", "scikit-build-core>=0.11", "cmake", "ninja")
    project = ROOT / "tests" / "consumer" / "wheel"
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps")
    examples = f"--config-settings=cmake.define.examples={ROOT / 'examples' / 'cpp'}"
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    run(python, *install, examples, project, env={"PATH": path})
    check_program(python.with_name("run_checkpoint"), checkpoint)


def test_without_a_toolkit_the_cpu_part_is_built_and_that_is_said(
    source: Path, tmp_path: Path
) -> None:
    options = ("-G", "Ninja", "-DSIDA_BUILD_TESTS=OFF", "-DSIDA_CUDA=AUTO")
    missing = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"
    said = run("cmake", "-S", source, "-B", tmp_path, *options, missing)
    assert "sida: without the CUDA backend, since no nvcc" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_a_stranger_finds_the_cuda_backend(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    project = ROOT / "tests" / "consumer" / "find_package_cuda"
    for cuda in ("OFF", "AUTO"):
        plain = ("-G", "Ninja", "-DSIDA_BUILD_TESTS=OFF", "-DSIDA_BUILD_EXAMPLES=OFF")
        options = (*plain, f"-DSIDA_CUDA={cuda}", "-DCMAKE_CUDA_ARCHITECTURES=80")
        said = run("cmake", "-S", source, "-B", tmp_path / cuda, *options)
        assert ("sida: with the CUDA backend" in said) == (cuda == "AUTO")
        run("cmake", "--build", tmp_path / cuda)
        run("cmake", "--install", tmp_path / cuda, "--prefix", tmp_path / f"installed-{cuda}")
        shutil.rmtree(tmp_path / cuda)
    user = ("cmake", "-S", project, "-G", "Ninja", "-B")
    lacking = f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed-OFF'}"
    assert "built without CUDA" in run(*user, tmp_path / "lacking", lacking, fails=True)
    run(*user, tmp_path / "user", f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed-AUTO'}")
    run("cmake", "--build", tmp_path / "user")
    program = tmp_path / "user" / "run_checkpoint_cuda"
    if shutil.which("nvidia-smi") is None:
        assert "cuda: " in run(program, checkpoint, fails=True)
    else:
        check_program(program, checkpoint)


def test_missing_dependencies_are_named(source: Path, python: Path, tmp_path: Path) -> None:
    missing = "-DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON"
    said = run("cmake", "-S", source, "-B", tmp_path / "a", "-G", "Ninja", missing, fails=True)
    assert "sudo apt-get install libeigen3-dev" in said
    cmake_dir = run(python, "-m", "sida", "--cmake-dir", cwd=tmp_path).strip()
    project = ROOT / "tests" / "consumer" / "wheel"
    options = (f"-Dsida_DIR={cmake_dir}", missing, "-G", "Ninja")
    said = run("cmake", "-S", project, "-B", tmp_path / "b", *options, fails=True)
    assert "sida-moe[cpp]" in " ".join(said.split())


def test_an_editable_install_follows_the_sources(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    python = new_environment(tmp_path_factory.mktemp("editable"))
    run(python, "-m", "pip", "install", CPU_ALONE, *HASTY, "-e", source)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    where = "import sida, sida._core; print(sida.__file__, sida._core.__version__)"
    assert str(source) in run(python, "-c", where, cwd=elsewhere)
    init = source / "python" / "sida" / "__init__.py"
    init.write_text(init.read_text() + "\nedited = True\n")
    run(python, "-c", "import sida; assert sida.edited", cwd=elsewhere)
    include_dir = Path(run(python, "-m", "sida", "--include-dir", cwd=elsewhere).strip())
    assert (include_dir / "sida" / "sida.hpp").is_file()
