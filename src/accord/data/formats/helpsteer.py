"""HelpSteer2 and HelpSteer3 (Wang et al. 2024, 2025): ratings, and preferences whose negative side is response 1.

A HelpSteer2 prompt of several turns is one text with tags between the turns; it becomes a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, items, messages, number, string
from accord.data.formats.comparisons import answer, compared, strength
from accord.errors import RowError
from accord.types import Message, RatedCompletion, Record, Source

__all__ = ["ATTRIBUTES", "read_helpsteer2", "read_helpsteer2_preference", "read_helpsteer3"]

Row = Mapping[str, Any]

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""What HelpSteer2 rates, each from 0 to 4."""
_HIGHEST = 4
_STRONGEST = 3
_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


def read_helpsteer2(row: Row, source: Source) -> list[Record]:
    """prompt, response and the five attributes."""
    ratings = {}
    for name in ATTRIBUTES:
        value = number(row, name, source)
        if value is None or not 0 <= value <= _HIGHEST:
            what = f"Column {name!r} must be a number from 0 to {_HIGHEST}, not {value!r:.40}."
            raise RowError(what, where=str(source), fix="Mend or remove the row.")
        ratings[name] = value
    return [RatedCompletion(_prompt(row, source), answer(string(row, "response", source)), ratings, source)]


def read_helpsteer2_preference(row: Row, source: Source) -> list[Record]:
    """prompt, response_1, response_2, preference_strength: -3 (response 1 is much better) to 3 (response 2 is)."""
    value = strength(number(row, "preference_strength", source), "preference_strength", _STRONGEST, source)
    first, second = (answer(string(row, f"response_{k}", source)) for k in (1, 2))
    return compared(_prompt(row, source), first, second, -value, source, margin=True)


def read_helpsteer3(row: Row, source: Source) -> list[Record]:
    """context, response1, response2, overall_preference: -3 (response 1 is much better) to 3 (response 2 is)."""
    value = strength(number(row, "overall_preference", source), "overall_preference", _STRONGEST, source)
    first, second = (answer(string(row, f"response{k}", source)) for k in (1, 2))
    prompt = messages(items(row, "context", source), "context", source)
    return compared(prompt, first, second, -value, source, margin=True)


def _prompt(row: Row, source: Source) -> tuple[Message, ...]:
    text, *rest = _TURN.split(string(row, "prompt", source))
    turns = [Message("user", text)]
    turns += [Message(role.lower(), said) for role, said in zip(rest[::2], rest[1::2], strict=True)]
    return tuple(turns)


FORMATS.add("helpsteer2", Format(("prompt", "response", *ATTRIBUTES), "RatedCompletion", read_helpsteer2))
FORMATS.add(
    "helpsteer2-preference",
    Format(
        ("prompt", "response_1", "response_2", "preference_strength"),
        "PreferencePair or Ranking",
        read_helpsteer2_preference,
    ),
)
FORMATS.add(
    "helpsteer3",
    Format(("context", "response1", "response2", "overall_preference"), "PreferencePair or Ranking", read_helpsteer3),
)
