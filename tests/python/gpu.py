# SPDX-License-Identifier: Apache-2.0
"""Whether tests on a GPU can run, and why not."""

from __future__ import annotations

import pytest

import sida
from sida._core import check_cuda


def _reason() -> str:
    """Empty where there is a GPU, sida's part for it, and a torch that uses it."""
    try:
        check_cuda("cuda")
    except sida.CudaError as error:
        return str(error)
    torch = pytest.importorskip("torch")
    return "" if torch.cuda.is_available() else "torch has no CUDA"


REASON = _reason()
needs_gpu = pytest.mark.skipif(bool(REASON), reason=REASON or "-")
