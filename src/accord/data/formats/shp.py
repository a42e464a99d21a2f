"""Stanford Human Preferences (Ethayarajh et al. 2022): two comments on a post; `labels` 1 means that A is better.

`shp` reads every row. Where the scores are close the preference says little: `shp-clear` reads only rows whose better
comment has at least twice the score, as the authors advise, and counts the others as left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, LeftOut, number, string, user_turn
from accord.data.formats.comparisons import answer, compared
from accord.errors import RowError
from accord.types import Record, Source

__all__ = ["CLEAR_RATIO", "read", "read_clear"]

Row = Mapping[str, Any]

CLEAR_RATIO = 2.0
"""Least ratio of the two scores that `shp-clear` takes."""


def read(row: Row, source: Source) -> list[Record | LeftOut]:
    """history, human_ref_A, human_ref_B, labels: 1 if A is better, 0 if B is; score_ratio."""
    label = row["labels"]
    if label not in (0, 1):
        what = f"Column 'labels' must be 1 (A is better) or 0 (B is), not {label!r:.40}."
        raise RowError(what, where=str(source), fix="Mend or remove the row.")
    a, b = (answer(string(row, column, source)) for column in ("human_ref_A", "human_ref_B"))
    return [*compared(user_turn(string(row, "history", source)), a, b, 1 if label else -1, source)]


def read_clear(row: Row, source: Source) -> list[Record | LeftOut]:
    """The same, if score_ratio is at least CLEAR_RATIO."""
    ratio = number(row, "score_ratio", source) or 0.0
    if ratio < CLEAR_RATIO:
        return [LeftOut(f"The score ratio {ratio:g} is under {CLEAR_RATIO:g}.")]
    return read(row, source)


_COLUMNS = ("history", "human_ref_A", "human_ref_B", "labels", "score_ratio")
FORMATS.add("shp", Format(_COLUMNS, "PreferencePair", read))
FORMATS.add("shp-clear", Format(_COLUMNS, "PreferencePair", read_clear, on_request=True))
