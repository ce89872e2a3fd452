# SPDX-License-Identifier: Apache-2.0
"""Whether tests on a GPU can run, and why not; what they bring there."""

from __future__ import annotations

from typing import Any

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


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch's tensors, on the GPU."""
    return {name: value.to("cuda") for name, value in batch.items()}
