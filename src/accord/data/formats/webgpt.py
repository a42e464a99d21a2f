"""WebGPT comparisons (Nakano et al. 2021): two answers to a question, with scores that sum to zero.

Equal scores are a tie. The citation marks of the answers, such as [1], are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, number, string, user_turn
from accord.data.formats.comparisons import answer, compared, strength
from accord.types import Record, Source

__all__ = ["read"]


def read(row: Mapping[str, Any], source: Source) -> list[Record]:
    """question (text, or an object with full_text), answer_0, answer_1, score_0, score_1: the higher is better."""
    asked = row["question"]
    asked = asked.get("full_text") if isinstance(asked, dict) else asked
    prompt = user_turn(string({"question": asked}, "question", source))
    first, second = (answer(string(row, f"answer_{k}", source)) for k in (0, 1))
    scores = [strength(number(row, f"score_{k}", source), f"score_{k}", 1, source) for k in (0, 1)]
    return compared(prompt, first, second, scores[0] - scores[1], source)


FORMATS.add(
    "webgpt", Format(("question", "answer_0", "answer_1", "score_0", "score_1"), "PreferencePair or Ranking", read)
)
