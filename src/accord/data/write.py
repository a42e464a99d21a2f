"""Rows into a new .jsonl file: never over an old one, whole or not at all, with a list of what became of the others.

Beside ``OUT.jsonl`` stands ``OUT.jsonl.changes`` if a row was dropped or something of it was left out: one line each,
with its ``file:line``, the rule and the reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from accord.data.formats import members
from accord.data.problems import Problem
from accord.data.sources import Row
from accord.errors import EmptyDataError, RowError, RunError
from accord.files import atomic_file, write_text
from accord.types import (
    Content,
    LabelledCompletion,
    PreferencePair,
    Prompt,
    Ranking,
    RatedCompletion,
    Record,
    Source,
)

__all__ = ["Changes", "RowFile", "canonical", "changes_of", "new_file", "refuse_existing"]


class Changes:
    """What became of the rows that were read: ``rows == kept + dropped``.

    `left_out` counts parts of rows that their format leaves out on purpose; such a row may still be kept.
    """

    def __init__(self) -> None:
        self.rows = self.kept = self.left_out = 0
        self.causes: Counter[str] = Counter()
        self._lines: list[str] = []

    @property
    def dropped(self) -> int:
        """Rows of which nothing was written."""
        return self.causes.total()

    def note(self, problem: Problem) -> None:
        """List a problem; unless it is something left out on purpose, its row is dropped."""
        if problem.stops:
            self.rows += 1
            self.causes[problem.rule] += 1
        else:
            self.left_out += 1
        action = "dropped" if problem.stops else "left out"
        line = {"row": str(problem.source), "action": action, "rules": [problem.rule], "reasons": [problem.what]}
        self._lines.append(json.dumps(line) + "\n")

    def keep(self) -> None:
        """Count a row of which something was written."""
        self.rows += 1
        self.kept += 1

    def drop_empty(self) -> None:
        """Count a row of which everything was left out; the reasons are listed already."""
        self.rows += 1
        self.causes["left-out"] += 1

    def extend(self, other: Changes) -> None:
        """Add what became of the rows of another file."""
        self.rows += other.rows
        self.kept += other.kept
        self.left_out += other.left_out
        self.causes += other.causes
        self._lines += other._lines

    def summary(self) -> str:
        """One line: ``100 rows: 98 kept, 2 dropped (empty 2)``."""
        line = f"{self.rows:,} rows: {self.kept:,} kept"
        if self.causes:
            causes = ", ".join(f"{rule} {count:,}" for rule, count in self.causes.items())
            line += f", {self.dropped:,} dropped ({causes})"
        return line + (f"; parts left out: {self.left_out:,}" if self.left_out else "")

    def write(self, path: Path) -> None:
        """Write the list, if there is anything to list."""
        if self._lines:
            write_text(path, "".join(self._lines))


class RowFile:
    """A .jsonl file being written; `count` lines so far."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.count = 0

    def write(self, row: Row, source: Source) -> None:
        """Add a row, or the rows of a unit, one line each. Dates and times become text.

        Raises:
            RowError: a value that JSON cannot hold, such as bytes.
        """
        for member in members(row):
            self._file.write(_line(member, source))
            self.count += 1


@contextmanager
def new_file(path: Path, changes: Changes | None = None) -> Iterator[RowFile]:
    """Write a file that must be new and, beside it, the list of `changes`; both appear if the block ends without error.

    Raises:
        RunError: it exists, or is no .jsonl file.
        EmptyDataError: nothing was written.
    """
    refuse_existing(path)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        rows = RowFile(file)
        yield rows
        if not rows.count:
            fix = "`accord data check` shows what is wrong with the rows."
            raise EmptyDataError("No row is left, so nothing is written.", where=str(path), fix=fix)
        if changes is not None:
            changes.write(changes_of(path))


def refuse_existing(path: Path) -> None:
    """Check that a .jsonl file and the list beside it are still to be written.

    Raises:
        RunError: one of them exists, or the name does not end in .jsonl.
    """
    if path.suffix != ".jsonl":
        raise RunError("Data is written as JSON lines.", where=str(path), fix="Name it something.jsonl")
    for taken in (path, changes_of(path)):
        if taken.exists():
            raise RunError("This file exists.", where=str(taken), fix="Choose another file with --out.")


def changes_of(path: Path) -> Path:
    """Where it is listed what became of the rows that are not in `path`."""
    return path.with_name(f"{path.name}.changes")


def canonical(record: Record) -> dict[str, Any]:
    """The record as a row of Accord's own columns; reading it gives an equal record (but for its place).

    Example:
        >>> canonical(PreferencePair("2 + 2 =", " 4", " 5"))
        {'prompt': '2 + 2 =', 'chosen': ' 4', 'rejected': ' 5'}
    """
    if isinstance(record, Prompt):
        row = {"id": record.id, "prompt": _content(record.content)}
        needs = [{"kind": need.kind, **need.options} for need in record.requirements]
        told: dict[str, Any] = {"requirements": needs or None, "answer": record.answer}
        return row | {name: value for name, value in told.items() if value is not None}
    row = {"prompt": _content(record.prompt)}
    if isinstance(record, PreferencePair):
        row |= {"chosen": _content(record.chosen), "rejected": _content(record.rejected)}
        told = {"margin": record.margin, "probability": record.probability}
        return row | {name: value for name, value in told.items() if value is not None}
    if isinstance(record, Ranking):
        return row | {"completions": [_content(text) for text in record.completions], "ranks": list(record.ranks)}
    row["completion"] = _content(record.completion)
    if isinstance(record, LabelledCompletion):
        row["label"] = record.label
    if isinstance(record, RatedCompletion):
        row["ratings"] = dict(record.ratings)
    return row


def _line(row: Row, source: Source) -> str:
    try:
        line = json.dumps(row, ensure_ascii=False, default=_as_text)
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row, default=_as_text)  # half a surrogate pair, in a column that no format reads
    except TypeError as error:
        fix = "Remove that column; `accord data convert` writes only what training reads."
        raise RowError(f"The row cannot be written as JSON: {error}.", where=str(source), fix=fix) from None
    return line + "\n"


def _as_text(value: Any) -> str:
    """A date or time of a parquet file."""
    if not hasattr(value, "isoformat"):
        raise TypeError(f"a column holds {type(value).__name__}")
    return str(value.isoformat())


def _content(content: Content) -> Any:
    return content if isinstance(content, str) else [{"role": m.role, "content": m.content} for m in content]
