"""Ranks are ordered tie groups (0 is best); preference pairs are derived from them, never the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.stats import rankdata

from accord.errors import ConfigError, EmptyDataError
from accord.types import Judgement

__all__ = ["majority_ranking", "rank", "ranked_pairs"]


def rank(scores: Sequence[float], dead_zone: float = 0.0) -> tuple[int, ...]:
    """Rank by score, highest first; whatever is within `dead_zone` of a tie group's best belongs to the group.

    Example:
        >>> rank([0.2, 0.9, 0.85], dead_zone=0.1)
        (1, 0, 0)
    """
    ranks = [0] * len(scores)
    group, best = -1, float("inf")
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        if best - scores[index] > dead_zone:
            group, best = group + 1, scores[index]
        ranks[index] = group
    return tuple(ranks)


def majority_ranking(judgements: Sequence[Judgement], margin: float = 0.5) -> tuple[int, ...]:
    """What the annotators of one prompt say together: completions in order of their mean place (Borda count).

    Tied completions share their mean place. A completion whose mean place is within `margin` of a tie group's best
    belongs to the group; at half a place, one annotator of three cannot break a tie of the others by one place.

    Raises:
        EmptyDataError: no judgement.
        ConfigError: judgements of different prompts, or of different numbers of completions.
    """
    if not judgements:
        raise EmptyDataError("No judgement to rank by.", fix="Have at least one annotator judge the prompt.")
    prompts = {judgement.prompt_id for judgement in judgements}
    sizes = {len(judgement.ranks) for judgement in judgements}
    if len(prompts) > 1 or len(sizes) > 1:
        what = f"Judgements of {len(prompts)} prompts with {sorted(sizes)} completions cannot be one ranking."
        raise ConfigError(what, fix="Pass the judgements of one prompt's completions.")
    places = np.mean([rankdata(judgement.ranks) for judgement in judgements], axis=0)
    # Means of the same places in another order differ in the last bits.
    return rank([-float(place) for place in places], margin + 1e-9)


def ranked_pairs(ranks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """All (chosen, rejected) index pairs that a ranking holds, widest gap first; ties give none.

    Example:
        >>> ranked_pairs((0, 2, 1, 2))
        ((0, 1), (0, 3), (0, 2), (2, 1), (2, 3))
    """
    pairs = [
        (first, second) if ranks[first] < ranks[second] else (second, first)
        for first, second in combinations(range(len(ranks)), 2)
        if ranks[first] != ranks[second]
    ]
    return tuple(sorted(pairs, key=lambda pair: (ranks[pair[0]] - ranks[pair[1]], pair)))
