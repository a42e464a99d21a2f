"""Chatbot Arena (Chiang et al. 2024): two conversations and a vote for one, a tie, or both bad.

`arena` reads the releases of 33 and 140 thousand votes, `arena-55k` the one whose turns are JSON lists inside a text
and whose ties include both-bad. Both bad becomes two thumbs down, not a tie.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, LeftOut, items, messages, string
from accord.data.formats.comparisons import both_bad, compared
from accord.data.formats.conversation import split_equal_start
from accord.errors import RowError
from accord.types import Message, Record, Source

__all__ = ["read", "read_55k"]

Row = Mapping[str, Any]

_PREFERENCE = {"model_a": 1, "model_b": -1, "tie": 0}
_BOTH_BAD = ("tie (bothbad)", "both_bad")


def read(row: Row, source: Source) -> list[Record | LeftOut]:
    """winner, conversation_a, conversation_b: lists of messages that begin with the same user turn."""
    sides = [items(row, f"conversation_{side}", source) for side in "ab"]
    if any(_has_image(turn) for side in sides for turn in side):
        return [LeftOut("A message holds something other than text.")]
    first, second = (messages(side, "conversation", source) for side in sides)
    prompt, first, second = split_equal_start(first, second, source)
    winner = row["winner"]
    if winner in _BOTH_BAD:
        return [*both_bad(prompt, first, second, source)]
    if winner not in _PREFERENCE:
        known = ", ".join([*_PREFERENCE, *_BOTH_BAD])
        raise RowError(f"Unknown winner {winner!r:.40}.", where=str(source), fix=f"It must be one of: {known}.")
    return [*compared(prompt, first, second, _PREFERENCE[winner], source)]


def read_55k(row: Row, source: Source) -> list[Record | LeftOut]:
    """prompt, response_a, response_b: the turns as JSON lists; winner_model_a, winner_model_b, winner_tie: one is 1."""
    asked, a, b = (_turns(row, column, source) for column in ("prompt", "response_a", "response_b"))
    if None in (*asked, *a, *b):
        return [LeftOut("A turn is null.")]
    if not len(asked) == len(a) == len(b) or not asked:
        what = f"{len(asked)} prompts, but {len(a)} and {len(b)} responses."
        raise RowError(what, where=str(source), fix="Each prompt must have one response on each side.")
    votes = [str(row[f"winner_{name}"]) in ("1", "1.0", "True") for name in ("model_a", "model_b", "tie")]
    if sum(votes) != 1:
        what = "Exactly one of winner_model_a, winner_model_b and winner_tie must be 1."
        raise RowError(what, where=str(source), fix="Mend or remove the row.")
    first, second = (_conversation(asked, replies, source) for replies in (a, b))
    prompt, first, second = split_equal_start(first, second, source)
    return [*compared(prompt, first, second, votes[0] - votes[1], source)]


def _has_image(turn: Any) -> bool:
    parts = turn.get("content") if isinstance(turn, dict) else None
    return isinstance(parts, list) and any(isinstance(part, dict) and part.get("type") != "text" for part in parts)


def _turns(row: Row, column: str, source: Source) -> list[Any]:
    value = row[column]
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        what = f"Column {column!r} must be a JSON list of turns."
        raise RowError(what, where=str(source), fix='Write e.g. ["first turn", "second turn"]')
    return value


def _conversation(asked: list[Any], replies: list[Any], source: Source) -> tuple[Message, ...]:
    pairs = zip(asked, replies, strict=True)
    texts = [string({"turn": text}, "turn", source) for pair in pairs for text in pair]
    return tuple(Message(("user", "assistant")[k % 2], text) for k, text in enumerate(texts))


FORMATS.add(
    "arena",
    Format(("winner", "conversation_a", "conversation_b"), "PreferencePair, Ranking or LabelledCompletion", read),
)
FORMATS.add(
    "arena-55k",
    Format(
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        "PreferencePair or Ranking",
        read_55k,
    ),
)
