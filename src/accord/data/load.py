"""From what `--data` names to the records that one kind of training uses. Fails loudly; drops nothing silently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar, overload

from accord.data.formats import FORMATS, matching_formats, read_row, read_units, split_format
from accord.data.formats.base import row_id
from accord.data.problems import OnProblem, Problem
from accord.data.sources import Row, read_rows
from accord.data.usable import KINDS, Kind, flaws, labelled, unusable, usable
from accord.errors import ConfigError, EmptyDataError, RowError, UnknownNameError, unknown_name
from accord.types import (
    Demonstration,
    LabelledCompletion,
    PreferencePair,
    Prompt,
    Ranking,
    RatedCompletion,
    Record,
    Source,
)

__all__ = ["UNREAD", "LoadedData", "is_rowwise", "load", "read_records", "require_kind", "select"]

T = TypeVar("T", bound=Record, covariant=True)

_LISTED = 5


@dataclass(frozen=True, slots=True)
class LoadedData(Generic[T]):
    """Records of one kind, and what is wrong with the rows that were left out.

    Example: ``LoadedData([Demonstration("2 + 2 =", " 4")], rows=2, problems=[Problem("empty", ...)])``
    """

    records: list[T]
    rows: int
    problems: list[Problem]
    converted: int = 0
    """Pairs that became labels."""

    @property
    def dropped(self) -> dict[str, list[Source]]:
        """The places of what was left out, by cause."""
        places: dict[str, list[Source]] = {}
        for problem in self.problems:
            places.setdefault(problem.rule, []).append(problem.source)
        return places

    def summary(self) -> str:
        """One line: ``98 records from 100 rows; dropped 2: empty 2 (a.jsonl:3, a.jsonl:9)``.

        What a format left out on purpose is counted by itself: the row it is part of may still give records.
        """
        line = f"{len(self.records):,} records from {self.rows:,} rows"
        if self.converted:
            line += f"; of {self.converted:,} pairs the chosen completion counts as good, the rejected one as bad"
        dropped = self.dropped
        left_out = dropped.pop("left-out", [])
        if dropped:
            causes = [f"{rule} {len(places)} ({_places(places)})" for rule, places in dropped.items()]
            line += f"; dropped {sum(map(len, dropped.values())):,}: {', '.join(causes)}"
        return line + (f"; parts left out: {len(left_out):,} ({_places(left_out)})" if left_out else "")


@overload
def load(
    spec: str, kind: Literal["demonstrations"], limit: int | None = ..., *, skip_bad: bool = ...
) -> LoadedData[Demonstration]: ...
@overload
def load(
    spec: str, kind: Literal["preferences"], limit: int | None = ..., *, skip_bad: bool = ...
) -> LoadedData[PreferencePair | Ranking]: ...
@overload
def load(
    spec: str, kind: Literal["labels"], limit: int | None = ..., *, skip_bad: bool = ...
) -> LoadedData[LabelledCompletion]: ...
@overload
def load(
    spec: str, kind: Literal["ratings"], limit: int | None = ..., *, skip_bad: bool = ...
) -> LoadedData[RatedCompletion]: ...
@overload
def load(
    spec: str, kind: Literal["prompts"], limit: int | None = ..., *, skip_bad: bool = ...
) -> LoadedData[Prompt]: ...


def load(spec: str, kind: Kind, limit: int | None = None, *, skip_bad: bool = False) -> LoadedData[Record]:
    """Read the records of one kind.

    Any row gives its prompt for ``kind="prompts"`` (the row's `id`, else its file:line, names it), and a pair serves as
    labels: chosen is good, rejected is bad (Ethayarajh et al. 2024, §4.1), which `summary` says.
    Nothing else is converted: the chosen side of a pair is not a demonstration unless you say so.

    Args:
        spec: a file, a directory or a hub id (`accord.data.sources.read_rows`).
        kind: what is wanted.
        limit: stop after this many records; rows after that are not read.
        skip_bad: leave out rows that cannot be used and list them in `dropped`, instead of failing.

    Raises:
        RowError: rows that cannot be used: up to 5 with file:line, and how many there are.
        EmptyDataError, MissingDataError, DataError: nothing to read.
    """
    require_kind(kind)
    if limit is not None and limit < 1:
        raise ConfigError(f"The limit must be at least 1, not {limit}.", fix="Leave it out to read everything.")
    problems: list[Problem] = []
    records: list[Record] = []
    ids: set[str] = set()
    rows = converted = 0
    for source, row, found in read_records(spec, problems.append):
        rows += 1
        result = _use(found, kind, source, row_id(row, source), ids)
        if isinstance(result, Problem):
            problems.append(result)
        elif kind == "labels":
            for record in result:
                records += labelled(record) if isinstance(record, PreferencePair) else [record]
                converted += isinstance(record, PreferencePair)
        else:
            records += [replace(record, fields=row) if isinstance(record, Prompt) else record for record in result]
        if limit is not None and len(records) >= limit:
            records = records[:limit]
            break
    rows += sum(problem.rule in UNREAD for problem in problems)
    stopping = [problem for problem in problems if problem.stops]
    if stopping and not skip_bad:
        raise _failure(stopping, rows, spec, kind)
    loaded = LoadedData(records, rows, problems, converted)
    if not records:
        raise EmptyDataError(f"No row gives {kind}: {loaded.summary()}.", where=spec, fix=problems[0].fix)
    return loaded


UNREAD = frozenset(["encoding", "json", "csv", "schema"])
"""Rules of rows that never became records."""


def read_records(spec: str, on_problem: OnProblem) -> Iterator[tuple[Source, Row, list[Record]]]:
    """Yield every row that has a known format with its records; hand the others to `on_problem`.

    A format may be named after the data, ``DATA#FORMAT``. Where all of a row is left out, its records are none.
    """
    place, name = split_format(spec)
    yield from read_units(read_rows(place, on_problem), name, on_problem)


def require_kind(kind: str) -> Kind:
    """Check the name of a kind."""
    for known in KINDS:
        if kind == known:
            return known
    raise UnknownNameError(unknown_name("kind of data", kind, KINDS))


def is_rowwise(spec: str) -> bool:
    """Whether every row can be read by itself; of some formats, neighbouring rows belong together."""
    place, name = split_format(spec)
    _, row = next(read_rows(place, lambda _: None), (None, {}))
    return not any(FORMATS[each].together for each in ([name] if name else matching_formats(row)))


def select(row: Row, source: Source, kind: Kind, name: str | None = None) -> list[Record] | Problem:
    """The records of one row as training of `kind` uses them, or the first reason why it has none.

    Args:
        name: the format, where the user named one.
    """
    try:
        return _use(read_row(row, source, name), kind, source, row_id(row, source), set())
    except RowError as error:
        return Problem("schema", source, error.what, error.fix)


def _use(found: list[Record], kind: Kind, source: Source, prompt_id: str, ids: set[str]) -> list[Record] | Problem:
    """The records of one row as `kind` uses them, or the first reason why not."""
    selected = usable(found, kind, prompt_id)
    if found and not selected:
        return unusable(found[0], kind).at(source)
    for record in selected:
        flaw = next(flaws(record), None)
        if flaw is not None:
            return flaw.at(source)
        if isinstance(record, Prompt):
            if record.id in ids:
                fix = "Give every row its own id, or remove the column id."
                return Problem("duplicate-id", source, f"Another prompt has the id {record.id!r}.", fix)
            ids.add(record.id)
    return selected


def _failure(problems: list[Problem], rows: int, spec: str, kind: Kind) -> RowError:
    if len(problems) == 1:
        return problems[0].error
    shown = problems[:_LISTED]
    listed = [f"\n  {problem.source}: {problem.what}" for problem in shown]
    more = f"\n  ... and {len(problems) - len(shown):,} more" if len(problems) > len(shown) else ""
    fixes = dict.fromkeys(problem.fix for problem in shown if problem.fix)
    advice = "\n  → ".join([*fixes, f"`accord data check --data {spec}` shows every problem by rule."])
    what = f"{len(problems):,} of {rows:,} rows cannot be used as {kind}:{''.join(listed)}{more}"
    return RowError(what, where=spec, fix=advice)


def _places(places: list[Source]) -> str:
    more = ", ..." if len(places) > _LISTED else ""
    return ", ".join(map(str, places[:_LISTED])) + more
