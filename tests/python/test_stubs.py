# SPDX-License-Identifier: Apache-2.0
"""The stub of the compiled module and the module itself name the same things."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import sida
from sida import _core

STUB = Path(sida.__file__).with_name("_core.pyi")
TREE = ast.parse(STUB.read_text())
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
BOUND = [name for name, value in vars(_core).items() if isinstance(value, type)]
TYPES_ONLY = {"LookAheadStats", "LayerStats", "CacheStats", "_DLPackArray"}


def parameters(arguments: ast.arguments) -> list[tuple[str, bool, str | None]]:
    """(name, keyword only, default) of each parameter but self."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += arguments.defaults
    found = [(a.arg, False, d) for a, d in zip(positional, defaults, strict=True)]
    found += [
        (a.arg, True, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return [(n, k, None if d is None else ast.unparse(d)) for n, k, d in found if n != "self"]


def signature(doc: str) -> list[tuple[str, bool, str | None]]:
    """The parameters in the first line of a docstring of pybind11."""
    line = re.sub(r"<[^>]*>", "'...'", doc.strip().splitlines()[0])
    function = ast.parse(f"def {line}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return parameters(function.args)


def members(cls: type) -> dict[str, Any]:
    wanted = {"__init__", "__len__", "__eq__"}
    return {
        name: value
        for name, value in vars(cls).items()
        if (not name.startswith("_") or name in wanted)
        and "signature" not in (getattr(value, "__doc__", None) or "")  # no constructor
    }


def test_the_same_names() -> None:
    assert set(CLASSES) - TYPES_ONLY == set(BOUND)
    functions = {node.name for node in TREE.body if isinstance(node, ast.FunctionDef)}
    compiled = {n for n, v in vars(_core).items() if callable(v) and not isinstance(v, type)}
    assert functions == {name for name in compiled if not name.startswith("_")}


@pytest.mark.parametrize("name", [name for name in BOUND if name != "CudaError"])
def test_the_same_members(name: str) -> None:
    stub = {node.name: node for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)}
    compiled = members(getattr(_core, name))
    assert set(stub) == set(compiled)
    for member, node in stub.items():
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        value = compiled[member]
        assert ("property" in decorators) == isinstance(value, property), member
        assert ("staticmethod" in decorators) == isinstance(value, staticmethod), member
        if not isinstance(value, property) and member != "__eq__":
            assert parameters(node.args) == signature(
                getattr(getattr(_core, name), member).__doc__
            ), member


def test_functions_take_the_same() -> None:
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef):
            assert parameters(node.args) == signature(getattr(_core, node.name).__doc__)


def test_statistics_have_the_same_keys() -> None:
    config = sida.MoeConfig(layers=1, experts=1, hidden_size=1, intermediate_size=1)
    import numpy as np

    one = np.ones((1, 1), np.float32)
    store = sida.ExpertStore.from_arrays(config, [[(one, one, None, None)]])
    stats = sida.OffloadScheduler(sida.ExpertCache(store, 1.0)).stats()

    def keys(name: str) -> set[str]:
        return {
            node.target.id
            for node in CLASSES[name].body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }

    assert set(stats) == keys("LayerStats") | keys("CacheStats")
    assert set(stats["layers"][0]) == keys("LayerStats")
    assert set(stats["look_ahead"]) == keys("LookAheadStats")
    assert set(stats["layers"][0]["look_ahead"]) < keys("LookAheadStats")
