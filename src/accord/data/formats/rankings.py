"""K-wise rankings: completions with ranks, and Nectar's list of answers that carry their own rank.

The smallest rank is the best; equal ranks are a tie. Ranks are renumbered 0, 1, 2, ... without gaps. Nectar's prompts
are HH-RLHF transcripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accord.data.formats.base import FORMATS, Format, complete, content, items, places
from accord.data.formats.hh import is_transcript, parse_prompt
from accord.errors import RowError
from accord.types import Content, Ranking, Record, Source

__all__ = ["read", "read_answers"]

Row = Mapping[str, Any]


def read(row: Row, source: Source) -> list[Record]:
    """prompt, completions, ranks."""
    prompt = content(row, "prompt", source)
    return [_ranking(prompt, items(row, "completions", source), items(row, "ranks", source), source)]


def read_answers(row: Row, source: Source) -> list[Record]:
    """prompt, answers: [{answer, rank}, ...]."""
    answers = items(row, "answers", source)
    if not all(isinstance(item, dict) and "answer" in item and "rank" in item for item in answers):
        what = "Every item of 'answers' must have an answer and a rank."
        raise RowError(what, where=str(source), fix='Write [{"answer": "...", "rank": 1}, ...]')
    prompt = content(row, "prompt", source)
    if isinstance(prompt, str) and is_transcript(prompt):
        prompt = parse_prompt(prompt, "prompt", source)
    return [_ranking(prompt, [item["answer"] for item in answers], [item["rank"] for item in answers], source)]


def _ranking(stated: Content, texts: Sequence[Any], ranks: Sequence[Any], source: Source) -> Ranking:
    if len(texts) != len(ranks):
        what = f"{len(texts)} completions but {len(ranks)} ranks."
        raise RowError(what, where=str(source), fix="Give every completion its rank; equal ranks are a tie.")
    numbered = places(ranks, source)
    read = [complete(stated, content({"completions": text}, "completions", source)) for text in texts]
    if len({prompt for prompt, _ in read}) > 1:
        what = "The completions do not belong to the same prompt."
        raise RowError(what, where=str(source), fix="Give all as plain text, or all as messages after one prompt.")
    prompt = read[0][0] if read else stated
    return Ranking(prompt, tuple(text for _, text in read), numbered, source)


FORMATS.add("ranking", Format(("prompt", "completions", "ranks"), "Ranking", read))
FORMATS.add("ranked-answers", Format(("prompt", "answers"), "Ranking", read_answers))
