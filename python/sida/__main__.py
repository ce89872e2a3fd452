# SPDX-License-Identifier: Apache-2.0
"""``python -m sida``: where C++ projects find the headers of the installed package."""

from __future__ import annotations

import argparse
from pathlib import Path

import sida


def _installed(part: str) -> Path:
    for folder in sida.__path__:
        path = Path(folder) / part
        if path.is_dir():
            return path.resolve()
    raise SystemExit(
        f"sida: {part} is not beside {sida.__file__}: this is a source tree on the path, "
        "not an installed package; install it with `pip install .`"
    )


def main() -> None:
    """Prints what the options ask for, each on a line of its own."""
    parser = argparse.ArgumentParser(
        prog="python -m sida", description="Facts for building C++ programs on the installed sida."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument(
        "--include-dir", action="store_true", help="print the folder that holds sida/sida.hpp"
    )
    parser.add_argument(
        "--cmake-dir", action="store_true", help="print the folder for -Dsida_DIR=..."
    )
    options = parser.parse_args()
    if not any(vars(options).values()):
        parser.error("expected --version, --include-dir or --cmake-dir")
    if options.version:
        print(sida.__version__)
    if options.include_dir:
        print(_installed("include"))
    if options.cmake_dir:
        print(_installed("share/cmake/sida"))


if __name__ == "__main__":
    main()
