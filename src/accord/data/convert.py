"""Any format into Accord's own columns, and, only where it is asked for, one kind of record into another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from accord.data.formats.base import row_id
from accord.data.load import read_records
from accord.data.problems import Problem
from accord.data.sources import Row
from accord.data.usable import Flaw, Kind, flaws, labelled, unusable, usable
from accord.data.write import Changes, canonical, new_file
from accord.types import (
    Demonstration,
    LabelledCompletion,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    Source,
)

__all__ = ["convert", "good_rows"]


def convert(spec: str, out: Path, to: Kind | None = None) -> Changes:
    """Write every record that `spec` names to a new .jsonl file, in Accord's own columns.

    Args:
        to: what to make of the records. `demonstrations`: the chosen side of a pair, the best of a ranking (each of
            those that share the first rank) and what has a thumb up. `labels`: chosen is good, rejected is bad.
            `prompts`: the prompt of every row. `preferences`, `ratings`: only such records. None: all, as they are.

    Raises:
        RunError: the file exists.
        EmptyDataError: no record is left.
    """
    changes = Changes()
    ids: set[str] = set()
    with new_file(out, changes) as file:
        for source, _, records in good_rows(spec, changes, to):
            made = _as_kind(records, to) if to else records
            if isinstance(made, Flaw):
                changes.note(made.at(source))
                continue
            repeated = next((r.id for r in made if isinstance(r, Prompt) and r.id in ids), None)
            if repeated is not None:
                changes.note(Problem("duplicate-id", source, f"Another prompt has the id {repeated!r}."))
                continue
            ids.update(record.id for record in made if isinstance(record, Prompt))
            for record in made:
                file.write(canonical(record), source)
            changes.keep()
    return changes


def good_rows(spec: str, changes: Changes, to: Kind | None = None) -> Iterator[tuple[Source, Row, list[Record]]]:
    """Rows with their records, or those that serve `to` if there are any; a row with a flaw in one of them is dropped.

    What is dropped or left out is listed in `changes`.
    """
    for source, row, found in read_records(spec, changes.note):
        records = (usable(found, to, row_id(row, source)) or found) if to else found
        flaw = next((flaw for record in records for flaw in flaws(record)), None)
        if flaw is not None:
            changes.note(flaw.at(source))
        elif records:
            yield source, row, records
        else:
            changes.drop_empty()


def _as_kind(records: Sequence[Record], kind: Kind) -> list[Record] | Flaw:
    """The records of one row as `kind`, or why there are none."""
    if kind == "demonstrations":
        made: list[Record] = [each for record in records for each in _imitated(record)]
    else:
        made = []
        for record in usable(records, kind, ""):  # a prompt has its name already
            made += labelled(record) if kind == "labels" and isinstance(record, PreferencePair) else [record]
    return made or unusable(records[0], kind)


def _imitated(record: Record) -> list[Demonstration]:
    """What the record says should be said: never what was not judged to be good."""
    if isinstance(record, Demonstration):
        return [record]
    if isinstance(record, PreferencePair):
        return [Demonstration(record.prompt, record.chosen, record.source)]
    if isinstance(record, Ranking):
        best = [text for text, rank in zip(record.completions, record.ranks, strict=True) if rank == 0]
        return [Demonstration(record.prompt, text, record.source) for text in best]
    if isinstance(record, LabelledCompletion) and record.label:
        return [Demonstration(record.prompt, record.completion, record.source)]
    return []
