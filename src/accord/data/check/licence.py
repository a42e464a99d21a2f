"""A licence that forbids commercial use, in the data set's card or licence file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from accord.data.problems import Problem
from accord.data.sources import data_files
from accord.types import Source

__all__ = ["restrictions"]

_NAMES = ("readme", "license", "licence", "copying")
# "commercial or non-commercial" is what a licence says that allows both.
_FORBIDS = re.compile(
    r"(?<!\bor )(?<!\band )\bnon-?commercial\b|\bcc[- ]by[- ]nc\b|\bresearch (?:use|purposes?) only\b", re.IGNORECASE
)


def restrictions(place: str) -> Iterator[Problem]:
    """The first line of each README and LICENSE beside the files of `place` that forbids commercial use."""
    for folder in dict.fromkeys(path.parent for path in data_files(place) or []):
        for path in sorted(folder.iterdir()):
            if path.name.lower().startswith(_NAMES) and path.is_file():
                yield from _first(path)


def _first(path: Path) -> Iterator[Problem]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = _FORBIDS.search(line)
        if match:
            fix = "Ask whether your use is allowed before you train."
            yield Problem("licence", Source(str(path), number), f"The licence says {match.group()!r}.", fix)
            return
