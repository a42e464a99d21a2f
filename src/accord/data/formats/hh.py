r"""HH-RLHF transcripts (Bai et al. 2022): ``\n\nHuman: ...\n\nAssistant: ...`` in the columns chosen and rejected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, number, string
from accord.data.formats.conversation import split_equal_start
from accord.errors import RowError
from accord.types import Message, PreferencePair, Record, Source

__all__ = ["both_transcripts", "is_transcript", "parse_prompt", "parse_transcript", "read"]

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: object) -> bool:
    """Whether this is a text that begins with a Human or Assistant turn."""
    return isinstance(text, str) and _TURN.match(text.lstrip()) is not None


def both_transcripts(row: Mapping[str, Any]) -> bool:
    """Whether chosen and rejected both begin as transcripts do."""
    return is_transcript(row["chosen"]) and is_transcript(row["rejected"])


def parse_transcript(text: str, column: str, source: Source) -> tuple[Message, ...]:
    """Split a transcript into messages; surrounding white space of a turn is dropped.

    Raises:
        RowError: an empty turn, or two turns of the same speaker in a row.
    """
    pieces = _TURN.split(text.lstrip())[1:]
    turns = tuple(Message(_ROLE[role], said.strip()) for role, said in zip(pieces[::2], pieces[1::2], strict=True))
    for k, message in enumerate(turns):
        expected = ("user", "assistant")[k % 2]
        if message.role != expected:
            what = f"Column {column!r}, turn {k + 1}: the {message.role} speaks where it is the {expected}'s turn."
            raise RowError(what, where=str(source), fix="Human and Assistant must alternate, Human first.")
        if not message.content:
            what = f"Column {column!r}, turn {k + 1} ({message.role}) is empty."
            raise RowError(what, where=str(source), fix="Remove the row, or the empty turn.")
    return turns


def parse_prompt(text: str, column: str, source: Source) -> tuple[Message, ...]:
    r"""A transcript that awaits an answer; the open ``\n\nAssistant:`` at its end is not a turn."""
    return parse_transcript(text.rstrip().removesuffix("\n\nAssistant:"), column, source)


def read(row: Mapping[str, Any], source: Source) -> list[Record]:
    """chosen, rejected: two transcripts with the same start."""
    chosen = parse_transcript(string(row, "chosen", source), "chosen", source)
    rejected = parse_transcript(string(row, "rejected", source), "rejected", source)
    prompt, better, worse = split_equal_start(chosen, rejected, source)
    return [PreferencePair(prompt, better, worse, number(row, "margin", source), source)]


FORMATS.add("hh-rlhf", Format(("chosen", "rejected"), "PreferencePair", read, when=both_transcripts))
