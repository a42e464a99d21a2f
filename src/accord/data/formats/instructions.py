"""Instruction data: Alpaca (instruction, input, output), Dolly (instruction, context, response), question and answer.

The instruction and what it works on become one user turn. Alpaca's baked `text` column is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, answer, number, row_id, string, user_turn
from accord.types import Demonstration, Message, PreferencePair, Prompt, Record, Source

__all__ = ["read_alpaca", "read_alpaca_preference", "read_dolly", "read_question"]

Row = Mapping[str, Any]


def _prompt(row: Row, extra: str, source: Source) -> tuple[Message, ...]:
    more = string(row, extra, source) if row.get(extra) is not None else ""
    return user_turn(string(row, "instruction", source), more)


def _answer(row: Row, column: str, source: Source) -> tuple[Message, ...]:
    return (Message("assistant", string(row, column, source)),)


def read_alpaca(row: Row, source: Source) -> list[Record]:
    """instruction, output, and optionally input."""
    return [Demonstration(_prompt(row, "input", source), _answer(row, "output", source), source)]


def read_alpaca_preference(row: Row, source: Source) -> list[Record]:
    """instruction, chosen, rejected, and optionally input and margin."""
    chosen, rejected = _answer(row, "chosen", source), _answer(row, "rejected", source)
    return [
        PreferencePair(_prompt(row, "input", source), chosen, rejected, number(row, "margin", source), source),
    ]


def read_dolly(row: Row, source: Source) -> list[Record]:
    """instruction, response, and optionally context."""
    return [Demonstration(_prompt(row, "context", source), _answer(row, "response", source), source)]


def read_question(row: Row, source: Source) -> list[Record]:
    """question, answer (GSM8K and its kin): a prompt whose answer can be checked, not a text to imitate."""
    asked = user_turn(string(row, "question", source))
    return [Prompt(row_id(row, source), asked, source=source, answer=answer(row, source))]


FORMATS.add("alpaca", Format(("instruction", "output"), "Demonstration", read_alpaca))
FORMATS.add(
    "alpaca-preference", Format(("instruction", "chosen", "rejected"), "PreferencePair", read_alpaca_preference)
)
FORMATS.add("dolly", Format(("instruction", "response"), "Demonstration", read_dolly))
FORMATS.add("question-answer", Format(("question", "answer"), "Prompt", read_question))
