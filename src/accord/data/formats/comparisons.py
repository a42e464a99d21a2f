"""One verdict on two answers: a preference, a tie, or both bad. Every two-answer format ends here."""

from __future__ import annotations

from accord.errors import RowError
from accord.types import Content, LabelledCompletion, Message, PreferencePair, Ranking, Record, Source

__all__ = ["answer", "both_bad", "compared", "strength"]


def answer(text: str) -> tuple[Message, ...]:
    """One assistant message."""
    return (Message("assistant", text),)


def compared(
    prompt: Content, first: Content, second: Content, preference: float, source: Source, *, margin: bool = False
) -> list[Record]:
    """A pair if one is preferred, a ranking with equal ranks if it is a tie.

    Args:
        preference: positive if the first answer is better, negative if the second is, 0 for a tie.
        margin: keep the size of the preference as the pair's margin.
    """
    if preference == 0:
        return [Ranking(prompt, (first, second), (0, 0), source)]
    chosen, rejected = (first, second) if preference > 0 else (second, first)
    return [PreferencePair(prompt, chosen, rejected, abs(preference) if margin else None, source)]


def both_bad(prompt: Content, first: Content, second: Content, source: Source) -> list[Record]:
    """Two thumbs down: that both are bad says of neither that it equals the other."""
    return [LabelledCompletion(prompt, text, False, source) for text in (first, second)]


def strength(value: float | None, column: str, limit: int, source: Source) -> float:
    """A signed strength of preference between -limit and limit.

    Raises:
        RowError: absent, or outside that range.
    """
    if value is None or abs(value) > limit:
        what = f"Column {column!r} must be a number from -{limit} to {limit}, not {value!r:.40}."
        raise RowError(what, where=str(source), fix="Mend or remove the row.")
    return value
