"""`--fix`: a new file without the rows that cannot be used, and beside it what became of every other row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from accord.data.check.contents import disordered
from accord.data.check.rules import RULES
from accord.data.formats import read_row
from accord.data.problems import Problem
from accord.data.sources import Row
from accord.data.write import RowFile
from accord.errors import ConfigError, EmptyDataError, RowError
from accord.files import atomic_file
from accord.types import Source

__all__ = ["Repair", "Repaired", "mend_surrogates", "repairing"]


@dataclass(slots=True)
class Repaired:
    """What became of the rows: kept (some of them changed) + dropped = read.

    Example: ``Repaired(Path("good.jsonl"), Path("good.jsonl.changes"), kept=98, changed=1, dropped=2)``
    """

    path: Path
    changes: Path
    kept: int = 0
    changed: int = 0
    dropped: int = 0


class Repair:
    """Writes row after row; `name` is the format that they are read as, where the user named one."""

    def __init__(self, done: Repaired, name: str | None, rows: RowFile, changes: TextIO) -> None:
        self.done, self._name, self._rows, self._changes = done, name, rows, changes

    def settle(self, source: Source, row: Row | None, problems: Sequence[Problem]) -> None:
        """Keep, change or drop a row, or rows that are one unit, as the rules say; None: a row that cannot be read."""
        told = [problem for problem in problems if RULES[problem.rule].action == "drop"]
        if told or row is None:
            self._tell(source, "dropped", told)
            return
        mended = row
        for problem in problems:
            change = {"duplicate-id": _without_id, "alternation": _joined, "surrogate": mend_surrogates}.get(
                problem.rule
            )
            new = change(mended) if change else None
            if new is not None and new != mended and self._fits(new, source, problem.rule):
                mended = new
                told.append(problem)
        if told:
            self.done.changed += 1
            self._tell(source, "changed", told)
        self._rows.write(mended, source)
        self.done.kept = self._rows.count

    def _fits(self, row: Row, source: Source, rule: str) -> bool:
        """Whether the changed row can be read and no longer breaks the rule."""
        try:
            records = read_row(row, source, self._name, lambda _: None)
        except RowError:
            return False
        return rule != "alternation" or not any(map(disordered, records))

    def _tell(self, source: Source, action: str, problems: Sequence[Problem]) -> None:
        rules = list(dict.fromkeys(problem.rule for problem in problems))
        reasons = list(dict.fromkeys(problem.what for problem in problems))
        line = {"row": str(source), "action": action, "rules": rules, "reasons": reasons}
        self._changes.write(json.dumps(line) + "\n")


@contextmanager
def repairing(path: Path, place: str, name: str | None) -> Iterator[Repair]:
    """Write to `path` and ``path + ".changes"``; both appear whole when the block ends without an error, or not at all.

    Raises:
        ConfigError: one of them exists, is no .jsonl file, or would become part of the data set that is read.
        EmptyDataError: no row is left.
    """
    changes = path.with_name(f"{path.name}.changes")
    if path.suffix != ".jsonl":
        raise ConfigError("The new file is written as JSON lines.", where=str(path), fix="Name it something.jsonl")
    for taken in (path, changes):
        if taken.exists():
            raise ConfigError("This file exists.", where=str(taken), fix="Choose another file with --fix.")
    folders = [folder for folder in (Path(place), Path(place.rpartition(":")[0] or place)) if folder.is_dir()]
    if any(path.resolve().is_relative_to(folder.resolve()) for folder in folders):
        fix = "Choose a place outside of the directory."
        raise ConfigError("The new file would become part of the data set.", where=str(path), fix=fix)
    done = Repaired(path, changes)
    with atomic_file(changes) as told, atomic_file(path) as good:
        with good.open("w", encoding="utf-8") as rows, told.open("w", encoding="utf-8") as lines:
            yield Repair(done, name, RowFile(rows), lines)
        if not done.kept:
            fix = "Run the check without --fix to see why."
            raise EmptyDataError("No row is left, so nothing is written.", where=place, fix=fix)


def mend_surrogates(row: Any) -> Any:
    """The row with U+FFFD in the place of every half of a surrogate pair."""
    if isinstance(row, str):
        return row.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(row, dict):
        return {mend_surrogates(key): mend_surrogates(value) for key, value in row.items()}
    return [mend_surrogates(value) for value in row] if isinstance(row, list) else row


def _without_id(row: Row) -> Row:
    return {column: value for column, value in row.items() if column != "id"}


def _joined(row: Row) -> Row:
    """The row with neighbouring messages of one role joined, a blank line between them."""
    return {column: _join(value) if isinstance(value, list) else value for column, value in row.items()}


def _join(turns: list[Any]) -> list[Any]:
    for speaker, text in (("role", "content"), ("from", "value")):
        if all(isinstance(turn, dict) and isinstance(turn.get(text), str) and speaker in turn for turn in turns):
            groups = [list(group) for _, group in groupby(turns, key=lambda turn: turn[speaker])]
            return [{**group[0], text: "\n\n".join(turn[text] for turn in group)} for group in groups]
    return turns
