"""UltraFeedback (Cui et al. 2023): four completions of an instruction, rated on aspects and overall; and its pairs.

In the first release many completions that deserved an overall score of 1 have 10. A 10 whose aspects, rated 1 to 5,
have a mean of at most 4 is therefore not believed, as in the authors' repair of 2023-12-29: the completion keeps its
aspects, loses the overall rating, is left out of the ranking, and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, nan
from statistics import fmean
from typing import Any

from accord.data.formats.base import FORMATS, Format, LeftOut, items, number, places, string, user_turn
from accord.data.formats.comparisons import answer, compared
from accord.data.formats.trl import preference_sides
from accord.errors import RowError
from accord.types import Ranking, RatedCompletion, Record, Source

__all__ = ["BELIEVED_MEAN", "read", "read_binarized"]

Row = Mapping[str, Any]

_HIGHEST = 10
BELIEVED_MEAN = 4.0
"""An overall score of 10 is believed only if the mean of the aspects is above this."""


def read(row: Row, source: Source) -> list[Record | LeftOut]:
    """instruction, completions: objects with response, annotations and overall_score.

    Every completion with its ratings, where they are not "N/A", and the ranking by overall score.
    """
    prompt = user_turn(string(row, "instruction", source))
    found: list[Record | LeftOut] = []
    ranked = []
    for k, item in enumerate(items(row, "completions", source), 1):
        if not isinstance(item, dict) or not isinstance(item.get("annotations"), dict):
            what = f"Completion {k} must be an object with a response and annotations."
            raise RowError(what, where=str(source), fix="Mend or remove the row.")
        text = answer(string({"response": item.get("response")}, "response", source))
        ratings = _aspects(item["annotations"], source)
        overall = number(item, "overall_score", source)
        if overall == _HIGHEST and ratings and fmean(ratings.values()) <= BELIEVED_MEAN:
            mean = fmean(ratings.values())
            found.append(LeftOut(f"Completion {k} has an overall score of 10, but its aspects only {mean:.2g} of 5."))
        elif overall is not None:
            ratings["overall"] = overall
            ranked.append((overall, text))
        if ratings:
            found.append(RatedCompletion(prompt, text, ratings, source))
        else:
            found.append(LeftOut(f"Completion {k} has no rating."))
    if len(ranked) > 1:
        ranks = places([-score for score, _ in ranked], source)
        found.append(Ranking(prompt, tuple(text for _, text in ranked), ranks, source))
    return found


def _aspects(annotations: Row, source: Source) -> dict[str, float]:
    ratings = {}
    for aspect, annotation in annotations.items():
        value = annotation.get("Rating") if isinstance(annotation, dict) else None
        if value is None or value == "N/A":
            continue
        try:
            ratings[aspect] = float(value)
        except (TypeError, ValueError):
            ratings[aspect] = nan
        if not isfinite(ratings[aspect]):
            what = f"The rating of {aspect!r} must be a number or N/A, not {value!r:.40}."
            raise RowError(what, where=str(source), fix="Mend or remove the row.")
    return ratings


def read_binarized(row: Row, source: Source) -> list[Record]:
    """prompt, chosen, rejected, score_chosen, score_rejected; equal scores are a tie."""
    prompt, chosen, rejected = preference_sides(row, source)
    better, worse = number(row, "score_chosen", source), number(row, "score_rejected", source)
    if better is None or worse is None or better < worse:
        what = f"The chosen completion has the score {better}, the rejected one {worse}."
        raise RowError(what, where=str(source), fix="The chosen one must have the higher score, or an equal one.")
    return compared(prompt, chosen, rejected, better - worse, source)


FORMATS.add("ultrafeedback", Format(("instruction", "completions"), "RatedCompletion and Ranking", read))
FORMATS.add(
    "ultrafeedback-binarized",
    Format(
        ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"), "PreferencePair or Ranking", read_binarized
    ),
)
