"""A format is a set of columns and a function from row to records; the helpers check one column each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accord.errors import RowError
from accord.registry import Registry
from accord.types import Content, Message, Record, Source

__all__ = [
    "FORMATS",
    "Format",
    "LeftOut",
    "answer",
    "complete",
    "content",
    "items",
    "messages",
    "number",
    "places",
    "row_id",
    "string",
    "user_turn",
]

_ANSWERS = ("tests", "answer", "ground_truth", "solution")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What a format leaves out on purpose, in place of a record: it is counted and listed, and stops nothing.

    Example: ``LeftOut("A message was deleted.")``
    """

    what: str


@dataclass(frozen=True, slots=True)
class Format:
    """One public data format.

    `read` turns a row into its records and raises RowError for one that breaks the format. `when` narrows the match by
    value where two formats share their columns. `on_request`: read only where the user names it, because the same
    columns can be read in another way. `alone`: a row that fits is nothing else, whatever other columns it has.
    `together`: the column whose consecutive equal values make one unit; `read` then gets ``{"rows": [row, ...]}``.

    Example: ``Format(("prompt", "completion"), "Demonstration", read)``
    """

    columns: tuple[str, ...]
    record: str
    read: Callable[[Mapping[str, Any], Source], Sequence[Record | LeftOut]]
    when: Callable[[Mapping[str, Any]], bool] | None = None
    on_request: bool = False
    alone: bool = False
    together: str | None = None

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has all columns of the format."""
        return all(column in row for column in self.columns) and (self.when is None or self.when(row))


FORMATS: Registry[Format] = Registry("data format", "accord.formats")


def string(row: Mapping[str, Any], column: str, source: Source) -> str:
    """The column as text that can be encoded; may be empty."""
    return _text(row[column], f"Column {column!r}", source)


def number(row: Mapping[str, Any], column: str, source: Source) -> float | None:
    """The optional column as a number, None if absent."""
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        what = f"Column {column!r} must be a finite number, not {type(value).__name__} {value!r:.40}."
        raise RowError(what, where=str(source), fix="Write e.g. 0.5, without quotes.")
    return float(value)


def answer(row: Mapping[str, Any], source: Source) -> str | None:
    """The ground truth of a prompt: the first of the columns tests, answer, ground_truth, solution that is not null.

    A number becomes its shortest text; a list of texts (unit tests) one text, each on a line.
    """
    column = next((name for name in _ANSWERS if row.get(name) is not None), None)
    if column is None:
        return None
    value = row[column]
    if isinstance(value, list):
        return "\n".join(_text(item, f"Column {column!r}, item {k}", source) for k, item in enumerate(value, 1))
    if isinstance(value, int | float):
        number(row, column, source)
        return str(int(value)) if value == int(value) else repr(value)
    return string(row, column, source)


def places(ranks: Sequence[Any], source: Source) -> tuple[int, ...]:
    """Ranks as they stand in a row, renumbered 0, 1, 2, ... without gaps; the smallest is the best.

    Raises:
        RowError: one is no number.
    """
    if any(isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank for rank in ranks):
        what = f"Ranks must be numbers, not {list(ranks)!r:.60}."
        raise RowError(what, where=str(source), fix="Write e.g. [0, 1, 1, 2]; the smallest is the best.")
    order = sorted(set(ranks))
    return tuple(order.index(rank) for rank in ranks)


def items(row: Mapping[str, Any], column: str, source: Source) -> list[Any]:
    """The column as a list."""
    value = row[column]
    if not isinstance(value, list):
        what = f"Column {column!r} must be a list, not {type(value).__name__}."
        raise RowError(what, where=str(source), fix="Write it as a JSON list; docs/data.md shows every format.")
    return value


def messages(value: Sequence[Any], column: str, source: Source) -> tuple[Message, ...]:
    """A list of role/content (or from/value) objects as messages."""
    return tuple(_message(item, f"Column {column!r}, message {k}", source) for k, item in enumerate(value, 1))


def content(row: Mapping[str, Any], column: str, source: Source) -> Content:
    """The column as plain text or as messages, whichever it holds."""
    value = row[column]
    return messages(value, column, source) if isinstance(value, list) else string(row, column, source)


def complete(prompt: Content, completion: Content) -> tuple[Content, Content]:
    """Bring prompt and completion to the same form: where one is a conversation, the other becomes one.

    A plain completion of a conversation is one assistant message; the plain prompt of a completion in messages is one
    user message. A completion that begins by repeating the prompt's messages loses them.
    """
    if isinstance(completion, str):
        return prompt, completion if isinstance(prompt, str) else (Message("assistant", completion),)
    if isinstance(prompt, str):
        start = next((k for k, message in enumerate(completion) if message.role == "assistant"), len(completion))
        repeats = start > 0 and completion[start - 1].content.strip() == prompt.strip()
        prompt = completion[:start] if repeats else (Message("user", prompt),)
    return prompt, completion[len(prompt) :] if completion[: len(prompt)] == prompt else completion


def user_turn(*texts: str) -> tuple[Message, ...]:
    """One user message of the texts that are not blank, a blank line between them."""
    return (Message("user", "\n\n".join(text.strip() for text in texts if text.strip())),)


def row_id(row: Mapping[str, Any], source: Source) -> str:
    """The row's own id (column `id`), else its place."""
    own = row.get("id")
    if isinstance(own, str | int) and str(own):
        return str(own).encode("utf-8", "backslashreplace").decode()  # an id may be anything that can be written
    return str(source)


def _message(item: Any, label: str, source: Source) -> Message:
    item = item if isinstance(item, dict) else {}
    role, text = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        what = f"{label}: the role must be one of system, user, assistant (or from: human, gpt), not {role!r:.40}."
        raise RowError(what, where=str(source), fix='Write {"role": "user", "content": "..."}')
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
        text = "".join(_text(part.get("text"), label, source) for part in text)
    return Message(_ROLES[role], _text(text, label, source))


def _text(value: Any, label: str, source: Source) -> str:
    if not isinstance(value, str):
        name = "null" if value is None else type(value).__name__
        raise RowError(f"{label} must be text, not {name}.", where=str(source), fix="Mend or remove the row.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"{label} holds half of a surrogate pair (character {error.start + 1}), which is not valid Unicode."
        raise RowError(what, where=str(source), fix="Write the whole character, or remove it.") from None
    return value
