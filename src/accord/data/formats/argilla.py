"""Argilla's records, nested (`to_json`) or flat (the hub export): responses to ranking, rating, label, text questions.

Each response gives records of its own. Only submitted ones count; suggestions are not responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accord.data.formats.annotations import Task, task
from accord.data.formats.base import FORMATS, Format, LeftOut
from accord.errors import RowError
from accord.types import Record, Source

__all__ = ["read_flat", "read_nested"]

Row = Mapping[str, Any]

_MARK = ".responses"
_ANSWERS = ("response", "completion", "answer", "correction")
"""Names of text questions whose text is an answer to the prompt, not a remark."""


def read_nested(row: Row, source: Source) -> list[Record | LeftOut]:
    """fields, responses: by question, a list of objects with a value."""
    fields, responses = row["fields"], row["responses"]
    if not isinstance(fields, dict) or not isinstance(responses, dict):
        what = "Columns 'fields' and 'responses' must be objects."
        raise RowError(what, where=str(source), fix="Export the records with `to_json`.")
    said = [
        (name, response.get("value"), response.get("status", "submitted"))
        for name, given in responses.items()
        for response in given or []
    ]
    return list(_records(task(fields, source), said, source))


def read_flat(row: Row, source: Source) -> list[Record | LeftOut]:
    """status, _server_id, the fields, and for every question QUESTION.responses and QUESTION.responses.status."""
    questions = [name.removesuffix(_MARK) for name in row if name.endswith(_MARK)]
    fields = {name: row[name] for name in row if "." not in name and name not in ("id", "status", "_server_id")}
    said = []
    for name in questions:
        values = row[name + _MARK] or []
        states = row.get(f"{name}{_MARK}.status") or ["submitted"] * len(values)
        said += [(name, value, state) for value, state in zip(values, states, strict=True)]
    return list(_records(task(fields, source), said, source))


def _records(shown: Task, said: list[tuple[str, Any, Any]], source: Source) -> Iterator[Record | LeftOut]:
    if not said:
        yield LeftOut("The record has no response.")
    for question, value, state in said:
        if state != "submitted":
            yield LeftOut(f"A response to {question!r} is a {state}, not submitted.")
        elif isinstance(value, list):
            yield from shown.ranked(_ranks(value, source))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield from shown.rated({question: float(value)})
        elif isinstance(value, str) and question.lower() in _ANSWERS:
            yield from shown.written(value)
        else:
            yield from shown.chosen(str(value))


def _ranks(value: list[Any], source: Source) -> dict[str, float]:
    """Ranks by the field's name: from objects with value and rank (equal ranks are a tie), or from names in order."""
    if all(isinstance(item, str) for item in value):
        return {name: k for k, name in enumerate(value)}
    if not all(isinstance(item, dict) and {"value", "rank"} <= set(item) for item in value):
        what = f"A ranking must be a list of names, or of objects with value and rank, not {value!r:.60}."
        raise RowError(what, where=str(source), fix="Mend or remove the record.")
    return {str(item["value"]): item["rank"] for item in value}


_RECORDS = "Ranking, PreferencePair, RatedCompletion, LabelledCompletion or Demonstration"
FORMATS.add("argilla", Format(("fields", "responses"), _RECORDS, read_nested, alone=True))
FORMATS.add(
    "argilla-flat",
    Format(
        ("status", "_server_id"),
        _RECORDS,
        read_flat,
        when=lambda row: any(name.endswith(_MARK) for name in row),
        alone=True,
    ),
)
