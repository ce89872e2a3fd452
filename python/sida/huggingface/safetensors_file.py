# SPDX-License-Identifier: Apache-2.0
"""Files in the safetensors format whose tensors are written one after the other, in any order.

The library of that name writes a file from tensors that are all in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors calls them."""
HEADER_ALIGNMENT = 64


def make_header(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return how a file begins, and where in the file the bytes of each tensor begin.

    Args:
        tensors: Shapes and dtypes count, values do not; they lie in this order.
        metadata: What the file says of itself.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = {}, 0
    for name, tensor in tensors.items():
        begins[name], end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    data = len(text) + 8
    begins = {name: data + begin for name, begin in begins.items()}
    return len(text).to_bytes(8, "little") + text, begins


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Write a tensor's bytes where the file, which is unbuffered, stands."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    write(file, flat.view(torch.uint8).numpy().data)


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data` where the file, which is unbuffered, stands."""
    view = memoryview(data)
    if view.nbytes == 0:
        return  # of no shape that can be cast
    view = view.cast("B")
    while view:
        view = view[file.write(view) :]
