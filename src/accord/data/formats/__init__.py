"""One reader per public data format, chosen by a row's columns; `FORMATS` is the register.

To add one: a `Format`, registered with `FORMATS.add` or by an entry point of the group ``accord.formats``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats import hh, instructions, rankings, requirements, trl
from accord.data.formats.base import FORMATS, Format
from accord.errors import RowError
from accord.types import Record, Source

__all__ = ["FORMATS", "Format", "matching_formats", "read_row"]

_BUILT_IN = (hh, instructions, rankings, requirements, trl)  # importing a module registers its formats


def matching_formats(row: Mapping[str, Any]) -> list[str]:
    """Names of the formats that the row fits, without those that another one contains.

    A row with `prompt`, `completion` and `label` is labelled, not a demonstration; a row with `instruction`, `output`,
    `chosen` and `rejected` is a demonstration and a preference.
    """
    names = [name for name in FORMATS if FORMATS[name].matches(row)]
    columns = {name: set(FORMATS[name].columns) for name in names}
    return [name for name in names if not any(columns[name] < columns[other] for other in names)]


def read_row(row: Mapping[str, Any], source: Source) -> list[Record]:
    """All records that a row holds.

    Raises:
        RowError: no format has these columns, or the row breaks its format.
    """
    names = matching_formats(row)
    if not names:
        what = f"No known format has the columns {', '.join(row) or '(none)'}."
        fix = "Rename the columns, e.g. to prompt and completion, or prompt, chosen and rejected; see docs/data.md"
        raise RowError(what, where=str(source), fix=fix)
    return [record for name in names for record in FORMATS[name].read(row, source)]
