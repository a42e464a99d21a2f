"""Where the prompt of two conversations ends: at equal leading messages, never at equal characters."""

from __future__ import annotations

from accord.errors import RowError
from accord.types import Message, Source

__all__ = ["split_equal_start"]

Turns = tuple[Message, ...]


def split_equal_start(chosen: Turns, rejected: Turns, source: Source) -> tuple[Turns, Turns, Turns]:
    """Split two conversations into their equal start (the prompt) and what follows, which begins with the assistant.

    Raises:
        RowError: no equal start, no assistant turn, or the two differ in a user turn (two prompts, not one).
    """
    shorter = min(len(chosen), len(rejected))
    equal = next((k for k in range(shorter) if chosen[k] != rejected[k]), shorter)
    if equal < shorter and {chosen[equal].role, rejected[equal].role} != {"assistant"}:
        what = f"Chosen and rejected first differ in message {equal + 1}, which is not the assistant's in both."
        fix = "Both must answer the same prompt: the messages before the first assistant turn that differs."
        raise RowError(what, where=str(source), fix=fix)
    end = min(equal, shorter - 1)
    while end > 0 and chosen[end].role != "assistant":
        end -= 1
    if end <= 0:
        what = "Chosen and rejected have no equal leading messages that could be the prompt."
        raise RowError(what, where=str(source), fix="Add a column `prompt`, or begin both with the same user turn.")
    return chosen[:end], chosen[end:], rejected[end:]
