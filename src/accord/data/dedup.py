"""The first of equal rows, or of nearly equal ones: alike in the prompt and in every completion, in the same roles."""

from __future__ import annotations

import hashlib
from pathlib import Path

from accord.data.convert import good_rows
from accord.data.minhash import NearDuplicates
from accord.data.problems import Problem
from accord.data.split import without_format
from accord.data.usable import completions, prompt_of, said, squash
from accord.data.write import Changes, new_file
from accord.types import Record, Source

__all__ = ["dedup"]


def dedup(spec: str, out: Path, near: float | None = None) -> Changes:
    """Write the rows of `spec` without repetitions to a new .jsonl file; the rows stay as they are.

    Equal rows have the same texts (but for white space), in the same roles, with the same labels, ranks, ratings,
    answers and requirements.
    A pair whose sides are exchanged is a contradiction, not a repetition, and stays.

    Args:
        near: also drop rows whose prompt and whose every completion resemble those of an earlier row at least so much
            (`accord.data.minhash`).

    Raises:
        ConfigError: `near` is out of range.
        RunError: the file exists.
    """
    without_format(spec)
    seen: dict[bytes, Source] = {}
    resembling = _Resembling(near) if near is not None else None
    changes = Changes()
    with new_file(out, changes) as file:
        for source, row, records in good_rows(spec, changes):
            first = seen.setdefault(_digest(records), source)
            if first != source:
                changes.note(Problem("duplicate", source, f"The same as {first}."))
                continue
            alike = resembling.find(records, source) if resembling else source
            if alike != source:
                changes.note(Problem("near-duplicate", source, f"Almost the same as {alike}."))
                continue
            file.write(row, source)
            changes.keep()
    return changes


class _Resembling:
    """Rows seen so far. Texts are compared one after the other, each only among rows whose texts so far are alike."""

    def __init__(self, threshold: float) -> None:
        self.texts: NearDuplicates[Source] = NearDuplicates(threshold)

    def find(self, records: list[Record], source: Source) -> Source:
        """The earlier row that this one resembles in every text, else `source` itself."""
        alike = ""
        place = source
        for role, text in _parts(records):
            place = self.texts.add(text, source, group=f"{alike}\0{role}") or source
            alike = f"{alike}\0{place}"
        return place


def _parts(records: list[Record]) -> list[tuple[str, str]]:
    """Every text of a row with its role: the prompt with what is said of all, then the completions."""
    parts = []
    for record in records:
        parts.append((f"{type(record).__name__} {said(record)}", squash(prompt_of(record))))
        parts += [(name, squash(content)) for name, content in completions(record).items()]
    return parts


def _digest(records: list[Record]) -> bytes:
    return hashlib.blake2b(repr(_parts(records)).encode("utf-8"), digest_size=16).digest()
