# SPDX-License-Identifier: Apache-2.0
"""Three kinds of English text from Debian's packages: a dictionary, scripture, and manuals.

They differ much, so that a model's routers have something to tell apart.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from shared import PARTS_OF_SPEECH, find_wordnet, read_senses, unpack_debian

KINDS = ("dictionary", "scripture", "manual")
NAMES_OF_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


def read_texts(kind: str, downloads: Path) -> list[str]:
    """All texts of a kind, in a fixed order.

    Args:
        kind: One of `KINDS`.
        downloads: Where packages are fetched to and unpacked.

    Raises:
        RuntimeError: A package could not be fetched.
    """
    read = {"dictionary": dictionary, "scripture": scripture, "manual": manual}[kind]
    return list(read(downloads))


def dictionary(downloads: Path) -> Iterator[str]:
    """WordNet's senses, as ``dog, domestic dog (noun): a member of the genus Canis ...``."""
    folder = find_wordnet(downloads)
    for part in PARTS_OF_SPEECH:
        for sense in read_senses(folder / f"data.{part}"):
            words = ", ".join(word.partition("(")[0].replace("_", " ") for word in sense.words)
            yield f"{words} ({NAMES_OF_PARTS[part]}): {sense.gloss}"


def scripture(downloads: Path) -> Iterator[str]:
    """The chapters of the King James Bible, their names first, then one numbered verse a line."""
    text = unpack_debian("bible-kjv-text", downloads)
    program = unpack_debian("bible-kjv", downloads) / "usr/bin/bible"
    command = [str(program), "-l100000", "-p", f"{text / 'usr/lib'}/", "gen1:1-rev22:21"]
    said = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True
    ).stdout
    yield from chapters(said)


def chapters(said: str) -> Iterator[str]:
    """What the program `bible` prints, parted before lines that are not indented."""
    lines: list[str] = []
    for line in said.splitlines():
        if lines and line.strip() and not line.startswith(" "):
            yield "\n".join(lines)
            lines = []
        if line.strip():
            lines.append(line.strip())
    if lines:
        yield "\n".join(lines)


def manual(downloads: Path) -> Iterator[str]:
    """The sources of Python's documentation, cut before each heading."""
    root = unpack_debian("python3.11-doc", downloads) / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        yield from sections(path.read_text(encoding="utf-8"))


def sections(source: str) -> Iterator[str]:
    """reStructuredText in parts that each begin with a heading.

    Rules and the blanks that fill up tables are shortened; licences, which repeat, are no part of
    the text.
    """
    source = re.sub(r"([=\-~^*+#\"'.])\1{3,}", lambda match: match[1] * 4, source)
    source = re.sub(r"(?<=\S) {3,}", "  ", source)
    source = re.sub(r"\n{3,}", "\n\n", source)
    for part in re.split(r"\n\n(?=[^\n]+\n([=\-~^*+#\"])\1{3}\n)", source)[::2]:
        if part.strip():
            yield part.strip()
