"""Label Studio's JSON export: tasks with annotations of the types pairwise, ranker, choices and rating.

Each annotation gives records of its own, so the votes of several people stay apart. Cancelled ones are left out, and so
are results of other types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.annotations import Task, task
from accord.data.formats.base import FORMATS, Format, LeftOut, items, number
from accord.errors import RowError
from accord.types import Record, Source

__all__ = ["read"]

Row = Mapping[str, Any]


def read(row: Row, source: Source) -> list[Record | LeftOut]:
    """data: the task's fields; annotations: objects with a list `result`."""
    fields = row["data"]
    if not isinstance(fields, dict):
        raise RowError("Column 'data' must be an object.", where=str(source), fix="Export the project as JSON.")
    found: list[Record | LeftOut] = []
    shown = task(fields, source)
    for annotation in items(row, "annotations", source):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            what = "An annotation must be an object with a list `result`."
            raise RowError(what, where=str(source), fix="Export the project as JSON, not as JSON-MIN.")
        if annotation.get("was_cancelled"):
            found.append(LeftOut("An annotation was cancelled."))
        else:
            found += _annotation(annotation["result"], shown, source)
    return found or [LeftOut("The task has no annotation.")]


def _annotation(results: list[Any], shown: Task, source: Source) -> list[Record | LeftOut]:
    found: list[Record | LeftOut] = []
    ratings: dict[str, float] = {}
    for result in results:
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict):
            raise RowError("A result must have a value.", where=str(source), fix="Export the project as JSON.")
        kind = result.get("type")
        if kind == "rating":
            rating = number(value, "rating", source)
            ratings |= {} if rating is None else {str(result.get("from_name", "rating")): rating}
        elif kind == "pairwise":
            found += _compared_task(result, shown).chosen(str(value.get("selected")))
        elif kind == "choices":
            words = value.get("choices")
            found += shown.chosen(str(words[0] if isinstance(words, list) and len(words) == 1 else words))
        elif kind == "ranker":
            found += shown.ranked({name: k for k, name in enumerate(_order(value.get("ranker"), source))})
        else:
            found.append(LeftOut(f"A result is of the type {kind!r:.40}."))
    return [*found, *(shown.rated(ratings) if ratings else [])]


def _compared_task(result: Row, shown: Task) -> Task:
    """The task with the two answers that the result names in `to_name`, left first, where it does."""
    names = [name.strip() for name in str(result.get("to_name")).split(",")]
    if len(names) != 2 or not set(names) <= set(shown.answers):
        return shown
    return Task(shown.prompt, {name: shown.answers[name] for name in names}, shown.source)


def _order(ranker: Any, source: Source) -> list[str]:
    """Item ids, best first. With several buckets the export does not say which of them is better."""
    full = [ids for ids in ranker.values() if ids] if isinstance(ranker, dict) else [ranker]
    if len(full) != 1 or not isinstance(full[0], list):
        what = "A ranker's result must be one list of item ids, or one bucket that holds all of them."
        raise RowError(what, where=str(source), fix="Rank all items in one bucket; remove those that were not ranked.")
    return [str(name) for name in full[0]]


FORMATS.add(
    "label-studio",
    Format(
        ("data", "annotations"),
        "PreferencePair, Ranking, LabelledCompletion or RatedCompletion",
        read,
    ),
)
