"""PKU-SafeRLHF (Ji et al. 2023, 2024): two preferences on the same two responses, which often disagree.

Which of them is meant is the user's choice: `pku-better` (more helpful) or `pku-safer` (less harmful).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, string, user_turn
from accord.data.formats.comparisons import answer, compared
from accord.errors import RowError
from accord.types import Record, Source

__all__ = ["read_better", "read_safer"]

Row = Mapping[str, Any]


def read_better(row: Row, source: Source) -> list[Record]:
    """prompt, response_0, response_1, better_response_id: 0 or 1."""
    return _read(row, "better_response_id", source)


def read_safer(row: Row, source: Source) -> list[Record]:
    """prompt, response_0, response_1, safer_response_id: 0 or 1."""
    return _read(row, "safer_response_id", source)


def _read(row: Row, column: str, source: Source) -> list[Record]:
    if row[column] not in (0, 1):
        what = f"Column {column!r} must be 0 or 1, not {row[column]!r:.40}."
        raise RowError(what, where=str(source), fix="Mend or remove the row.")
    first, second = (answer(string(row, f"response_{k}", source)) for k in (0, 1))
    return compared(user_turn(string(row, "prompt", source)), first, second, -1 if row[column] else 1, source)


_COLUMNS = ("prompt", "response_0", "response_1")
FORMATS.add("pku-better", Format((*_COLUMNS, "better_response_id"), "PreferencePair", read_better, on_request=True))
FORMATS.add("pku-safer", Format((*_COLUMNS, "safer_response_id"), "PreferencePair", read_safer, on_request=True))
