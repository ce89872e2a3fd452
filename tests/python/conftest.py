# SPDX-License-Identifier: Apache-2.0
"""Settings that all tests share."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Continuous integration tries the same examples every time; other runs look for new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Marks the tests of files that build models of the families; begins with the longest file."""
    items.sort(key=lambda item: item.path.name != "test_packaging.py")
    for item in items:
        used = {getattr(value, "__module__", None) for value in vars(item.module).values()}
        if "family_models" in used:
            item.add_marker("families")


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """What torch compiled for one test is not there for the next."""
    torch = pytest.importorskip("torch")
    torch.compiler.reset()
    yield
    torch.compiler.reset()
