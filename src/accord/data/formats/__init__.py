"""One reader per public data format, chosen by a row's columns; `FORMATS` is the register.

To add one: a `Format`, registered with `FORMATS.add` or by an entry point of the group ``accord.formats``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from accord.data.formats import (
    arena,
    argilla,
    helpsteer,
    hh,
    instructions,
    label_studio,
    oasst,
    pku,
    programs,
    rankings,
    rated,
    requirements,
    shp,
    summaries,
    trl,
    ultrafeedback,
    webgpt,
)
from accord.data.formats.base import FORMATS, Format, LeftOut
from accord.data.problems import OnProblem, Problem, fail
from accord.errors import AccordError, RowError
from accord.types import Record, Source

__all__ = ["FORMATS", "Format", "LeftOut", "matching_formats", "members", "read_row", "read_units", "split_format"]

Row = dict[str, Any]

# Importing a module registers its formats.
_PREFERENCES = (arena, hh, pku, rankings, oasst, shp, summaries, ultrafeedback, webgpt)
_OTHERS = (argilla, helpsteer, instructions, label_studio, programs, rated, requirements, trl)


def split_format(spec: str) -> tuple[str, str | None]:
    """What to read, and the format to read it as where that is named: ``pairs.jsonl#pku-safer``.

    Raises:
        UnknownNameError: there is no such format.
    """
    place, mark, name = spec.rpartition("#")
    if not mark or Path(spec).expanduser().exists():
        return spec, None
    _ = FORMATS[name]
    return place, name


def matching_formats(row: Mapping[str, Any]) -> list[str]:
    """Names of the formats that the row fits, without those that another one contains.

    A row with `prompt`, `completion` and `label` is labelled, not a demonstration; a row with `instruction`, `output`,
    `chosen` and `rejected` is a demonstration and a preference.
    """
    names = [name for name in _with_columns(tuple(row), tuple(FORMATS)) if FORMATS[name].matches(row)]
    names = [name for name in names if FORMATS[name].alone] or names
    columns = {name: set(FORMATS[name].columns) for name in names}
    return [name for name in names if not any(columns[name] < columns[other] for other in names)]


@lru_cache(maxsize=1024)
def _with_columns(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if set(FORMATS[name].columns) <= set(columns))


def read_row(
    row: Mapping[str, Any], source: Source, name: str | None = None, on_problem: OnProblem = fail
) -> list[Record]:
    """All records that a row holds, read as the format `name`, or as those that its columns fit.

    Args:
        on_problem: called for what the format leaves out on purpose; raises by default.

    Raises:
        RowError: no format has these columns, they can be read in several ways and none is named, the row is part of a
            larger unit, or it breaks its format.
    """
    names = _named(row, name, source) if name else _chosen(row, source)
    records: list[Record] = []
    for found in (found for each in names for found in _read(each, row, source)):
        if isinstance(found, LeftOut):
            fix = "`accord data convert` writes a file without what is left out."
            on_problem(Problem("left-out", source, found.what, fix))
        else:
            records.append(found)
    return records


def _read(name: str, row: Mapping[str, Any], source: Source) -> Sequence[Record | LeftOut]:
    try:
        return FORMATS[name].read(row, source)
    except AccordError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a value of a type that nobody foresaw
        fix = "Mend or remove the row; docs/data.md shows every format."
        raise RowError(f"The row does not fit the format {name!r}: {error}.", where=str(source), fix=fix) from None


def read_units(
    rows: Iterable[tuple[Source, Row]], name: str | None, on_problem: OnProblem
) -> Iterator[tuple[Source, Row, list[Record]]]:
    """Yield every row, or unit of consecutive rows that belong together, with its place and its records.

    What cannot be read, and what a format leaves out, goes to `on_problem`.
    """
    for (unit, _), group in groupby(rows, lambda item: _unit(item[1], name)):
        for source, row in group if unit is None else _joined(group):
            try:
                records = read_row(row, source, unit or name, on_problem)
            except RowError as error:
                on_problem(Problem("schema", source, error.what, error.fix))
            else:
                yield source, row, records


def members(row: Row) -> list[Row]:
    """The rows of a unit of `read_units`; a row by itself is its only member."""
    return list(row["rows"]) if set(row) == {"rows"} else [row]


def _joined(group: Iterable[tuple[Source, Row]]) -> Iterator[tuple[Source, Row]]:
    members = list(group)
    yield members[0][0], {"rows": [row for _, row in members]}


def _unit(row: Row, name: str | None) -> tuple[str | None, Any]:
    """The format that reads this row together with its neighbours, and what the neighbours must have in common."""
    for each in [name] if name else matching_formats(row):
        together = FORMATS[each].together
        if together is not None and FORMATS[each].matches(row):
            return each, row[together]
    return None, None


def _named(row: Mapping[str, Any], name: str, source: Source) -> list[str]:
    wanted = FORMATS[name]
    if not wanted.matches(row) and not (wanted.together and "rows" in row):
        what = f"The row does not fit the format {name!r}, which has the columns {', '.join(wanted.columns)}."
        raise RowError(what, where=str(source), fix="Leave out the #format to let the columns decide.")
    return [name]


def _chosen(row: Mapping[str, Any], source: Source) -> list[str]:
    names = matching_formats(row)
    if not names:
        what = f"No known format has the columns {', '.join(row) or '(none)'}."
        fix = "Rename the columns, e.g. to prompt and completion, or prompt, chosen and rejected; see docs/data.md"
        raise RowError(what, where=str(source), fix=fix)
    chosen = [name for name in names if not FORMATS[name].on_request]
    if not chosen:
        what = f"These columns can be read as {' or '.join(names)}, which may disagree."
        raise RowError(what, where=str(source), fix=f"Say which, after the name of the data: --data DATA#{names[0]}")
    for name in chosen:
        if FORMATS[name].together:
            what = f"Rows of {name} belong together and cannot be read one by one."
            fix = "Write them as records of their own first: accord data convert --data DATA --out NEW.jsonl"
            raise RowError(what, where=str(source), fix=fix)
    return chosen
