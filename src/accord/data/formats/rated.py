"""Ratings of one completion: Accord's own columns prompt, completion, ratings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, complete, content, number, string
from accord.errors import RowError
from accord.types import RatedCompletion, Record, Source

__all__ = ["read"]


def read(row: Mapping[str, Any], source: Source) -> list[Record]:
    """prompt, completion, ratings: an object of numbers by attribute."""
    stated = row["ratings"]
    if not isinstance(stated, dict):
        what = f"Column 'ratings' must be an object, not {type(stated).__name__}."
        raise RowError(what, where=str(source), fix='Write {"helpfulness": 3, "correctness": 4}')
    # Columnar files fill the attributes of other rows with null.
    given = {string({"ratings": name}, "ratings", source): number(stated, name, source) for name in stated}
    ratings = {name: value for name, value in given.items() if value is not None}
    if not ratings:
        raise RowError("There is no rating.", where=str(source), fix='Write e.g. {"helpfulness": 3}')
    prompt, completion = complete(content(row, "prompt", source), content(row, "completion", source))
    return [RatedCompletion(prompt, completion, ratings, source)]


FORMATS.add("rated", Format(("prompt", "completion", "ratings"), "RatedCompletion", read))
