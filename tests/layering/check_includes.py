# SPDX-License-Identifier: Apache-2.0
"""Checks the one-way includes of sida's public headers.

Usage: check_includes.py ROOT, the folder that holds include/sida. Prints what breaks a rule, and
exits with 1 if anything does.
"""

import re
import sys
from pathlib import Path

# Folder of include/sida -> the folders whose headers it may include beside its own.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "backend": {"core"},
    "hash": {"core", "backend"},
    "cache": {"core", "backend"},
    "ffn": {"core", "backend"},
    "schedule": {"core", "backend", "hash", "cache"},
    "layer": {"core", "backend", "hash", "cache", "ffn", "schedule"},
    "io": {"core", "backend", "hash", "cache", "ffn", "schedule"},
}
# The doors beside the folders, and what each opens.
DOORS: dict[str, set[str]] = {
    "sida.hpp": set(ALLOWED) - {"io"},
    "io.hpp": {"io"},
    "cuda.hpp": set(ALLOWED) - {"io"},
    "version.hpp": set(),
}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
CONDITION = re.compile(r"^[ \t]*#[ \t]*(?:el)?if.*CUDA.*$", re.MULTILINE)
CUDA_HEADER = re.compile(r"^(cuda|cublas|cudnn|curand|nvrtc|nvtx|cub/|thrust/|cooperative_groups)")


def check_header(headers: Path, header: Path) -> list[str]:
    """What breaks a rule in one header, which lies somewhere under `headers`."""
    place = header.relative_to(headers)
    folder = place.parts[0] if len(place.parts) > 1 else ""
    if folder and folder not in ALLOWED:
        return [f"{place}: '{folder}' is not among the folders {', '.join(ALLOWED)}"]
    if not folder and place.name not in DOORS:
        return [f"{place}: expected headers in folders; beside them only {', '.join(DOORS)}"]
    allowed = ALLOWED[folder] | {folder} if folder else DOORS[place.name]
    text = header.read_text(encoding="utf-8")
    problems = []
    for quote, target in INCLUDE.findall(text):
        if target.startswith("sida/"):
            parts = Path(target).parts[1:]
            if not (headers / Path(*parts)).is_file():
                problems.append(f"includes {target}, which does not exist")
            elif len(parts) == 1 and parts[0] != "version.hpp":
                problems.append(f"includes {target}, a door for users")
            elif len(parts) > 1 and parts[0] not in allowed:
                names = ", ".join(sorted(allowed)) or "nothing"
                problems.append(f"includes {target}, but may include {names}")
        elif quote == '"':
            problems.append(f'includes "{target}"; expected "sida/folder/file.hpp"')
        elif CUDA_HEADER.match(target):
            problems.append(f"includes <{target}>; CUDA's headers belong to src/cuda")
        elif target.startswith("nlohmann/") and folder != "io":
            problems.append(f"includes <{target}>; JSON belongs to io")
    problems += [
        f"has '{condition.strip()}'; a backend is chosen by file"
        for condition in CONDITION.findall(text)
    ]
    return [f"{place}: {problem}" for problem in problems]


def check(root: Path) -> list[str]:
    """What breaks a rule in the headers under root/include/sida."""
    headers = root / "include" / "sida"
    found = sorted(path for path in headers.rglob("*") if path.is_file())
    if not found:
        return [f"{headers}: expected headers, found none"]
    return [problem for header in found for problem in check_header(headers, header)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    broken = check(Path(sys.argv[1]))
    print("\n".join(broken) or "The includes go one way.")
    sys.exit(1 if broken else 0)
