"""TRL's columns, plain or conversational: prompt, completion, chosen, rejected, label, margin, probability, messages.

The prompt is explicit, or it is the equal leading *messages* of chosen and rejected; never equal leading characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, answer, complete, content, items, messages, number, row_id
from accord.data.formats.conversation import split_equal_start
from accord.data.formats.hh import both_transcripts
from accord.errors import RowError
from accord.types import Content, Demonstration, LabelledCompletion, PreferencePair, Prompt, Record, Source

__all__ = [
    "preference_sides",
    "read_conversation",
    "read_demonstration",
    "read_implicit",
    "read_label",
    "read_preference",
    "read_prompt",
]

Row = Mapping[str, Any]


def read_demonstration(row: Row, source: Source) -> list[Record]:
    """prompt, completion."""
    prompt, completion = complete(content(row, "prompt", source), content(row, "completion", source))
    return [Demonstration(prompt, completion, source)]


def read_label(row: Row, source: Source) -> list[Record]:
    """prompt, completion, label (true or false, or 1 or 0)."""
    label = row["label"]
    if label not in (True, False, 0, 1):
        what = f"Column 'label' must be true or false, not {label!r:.40}."
        raise RowError(what, where=str(source), fix="Write true for a good completion, false for a bad one.")
    prompt, completion = complete(content(row, "prompt", source), content(row, "completion", source))
    return [LabelledCompletion(prompt, completion, bool(label), source)]


def read_preference(row: Row, source: Source) -> list[Record]:
    """prompt, chosen, rejected, and optionally margin, and the probability that chosen is better."""
    margin, probability = number(row, "margin", source), number(row, "probability", source)
    if probability is not None and not 0 <= probability <= 1:
        fix = "Write the share of votes for chosen, from 0 to 1."
        raise RowError(f"Column 'probability' is {probability:g}.", where=str(source), fix=fix)
    return [PreferencePair(*preference_sides(row, source), margin, source, probability)]


def preference_sides(row: Row, source: Source) -> tuple[Content, Content, Content]:
    """The prompt, the chosen and the rejected completion, brought to the same form.

    Raises:
        RowError: chosen and rejected do not belong to the same prompt.
    """
    stated = content(row, "prompt", source)
    prompt, chosen = complete(stated, content(row, "chosen", source))
    other, rejected = complete(stated, content(row, "rejected", source))
    if other != prompt:
        what = "Chosen and rejected do not belong to the same prompt."
        raise RowError(what, where=str(source), fix="Give both as plain text, or both as messages after one prompt.")
    return prompt, chosen, rejected


def read_implicit(row: Row, source: Source) -> list[Record]:
    """chosen, rejected as message lists that begin with the same prompt."""
    chosen, rejected = content(row, "chosen", source), content(row, "rejected", source)
    if isinstance(chosen, str) or isinstance(rejected, str):
        what = "Plain chosen and rejected without a prompt, and not Human:/Assistant: transcripts."
        fix = "Add a column `prompt`; where the prompt ends is never guessed from equal characters."
        raise RowError(what, where=str(source), fix=fix)
    prompt, chosen, rejected = split_equal_start(chosen, rejected, source)
    return [PreferencePair(prompt, chosen, rejected, number(row, "margin", source), source)]


def read_conversation(row: Row, source: Source) -> list[Record]:
    """A conversation that ends with the assistant is a demonstration; one that awaits an answer is a prompt."""
    column = "messages" if "messages" in row else "conversations"
    turns = messages(items(row, column, source), column, source)
    if not turns or turns[-1].role != "assistant":
        return [Prompt(row_id(row, source), turns, source=source, answer=answer(row, source))]
    start = next(k for k, message in enumerate(turns) if message.role == "assistant")
    return [Demonstration(turns[:start], turns[start:], source)]


def read_prompt(row: Row, source: Source) -> list[Record]:
    """prompt, and optionally its answer."""
    return [Prompt(row_id(row, source), content(row, "prompt", source), source=source, answer=answer(row, source))]


FORMATS.add("prompt-completion", Format(("prompt", "completion"), "Demonstration", read_demonstration))
FORMATS.add("labelled", Format(("prompt", "completion", "label"), "LabelledCompletion", read_label))
FORMATS.add("preference", Format(("prompt", "chosen", "rejected"), "PreferencePair", read_preference))
FORMATS.add(
    "implicit-prompt",
    Format(("chosen", "rejected"), "PreferencePair", read_implicit, when=lambda row: not both_transcripts(row)),
)
FORMATS.add("messages", Format(("messages",), "Demonstration or Prompt", read_conversation))
FORMATS.add("conversations", Format(("conversations",), "Demonstration or Prompt", read_conversation))
FORMATS.add("prompt", Format(("prompt",), "Prompt", read_prompt))
