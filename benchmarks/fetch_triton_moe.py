# SPDX-License-Identifier: Apache-2.0
"""Brings vLLM's fused MoE kernel, plain Triton source, from PyPI to build/triton_moe/.

It is measured beside sida's kernels by cuda_expert_layer.py and never part of sida.
"""

import ast
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.33.0"
SOURCE = "vllm/model_executor/layers/fused_moe/fused_moe.py"
FUNCTIONS = ("write_zeros_to_output", "fused_moe_kernel")


def main() -> None:
    """Downloads the wheel and writes the two functions."""
    target = Path(__file__).parent.parent / "build" / "triton_moe"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "-q", "-d", folder, f"vllm=={VERSION}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            source = archive.read(SOURCE).decode()
    lines = source.splitlines()
    parts = [lines[0], lines[1], "import triton", "import triton.language as tl"]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            first = min(item.lineno for item in node.decorator_list)
            parts += ["", "", *lines[first - 1 : node.end_lineno]]
    target.mkdir(parents=True, exist_ok=True)
    (target / "fused_moe_kernel.py").write_text("\n".join(parts) + "\n")
    print(f"{SOURCE} of vllm {VERSION}: {', '.join(FUNCTIONS)} -> {target}")


if __name__ == "__main__":
    main()
