"""How far a panel agrees, and how good each annotator is: the ceiling for every model of its preferences.

The item is a pair of completions of one prompt; the label says which of the two is better, by identity and not by the
place where it was shown. Which one is called the first is a coin flip (a hash): if the order had a meaning, such as the
temperature, agreement by chance would be overstated and κ and α understated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Literal

from accord.errors import ConfigError, EmptyDataError
from accord.stats.agreement import Agreement, krippendorff_alpha, pairwise_agreement
from accord.types import Judgement

__all__ = ["PanelAgreement", "agreement"]

Vote = Literal[1, 0, -1]
"""The first is better, a tie, the second is better."""


@dataclass(frozen=True, slots=True)
class PanelAgreement:
    """Agreement of a panel, with intervals over prompts.

    `pairwise`: two annotators who both prefer one of two completions prefer the same. `alpha`: Krippendorff's α, ties
    being a label of their own. `annotators`: how often each one's preference is that of the majority of the others,
    wherever both have one; half is what guessing gives. `ceiling`: the same over all annotators: what one more
    annotator like them would reach, and so about the best that a model of their preferences can.
    """

    prompts: int
    pairs: int
    pairwise: Agreement
    alpha: Agreement
    annotators: Mapping[str, Agreement]
    ceiling: Agreement


def agreement(judgements: Sequence[Judgement], *, resamples: int = 1_000, seed: int = 0) -> PanelAgreement:
    """Measure a panel on everything it judged. Annotators may have judged different prompts.

    Raises:
        EmptyDataError: no judgement.
        ConfigError: an annotator judged a prompt twice, or rankings of one prompt differ in length.
    """
    if not judgements:
        raise EmptyDataError("No judgement to measure agreement on.", fix="Have the completions judged first.")
    by_prompt = _by_prompt(judgements)
    names = list(dict.fromkeys(judgement.annotator for judgement in judgements))
    votes: dict[str, list[Vote | None]] = {name: [] for name in names}
    clusters: list[str] = []
    for prompt_id, rankings in by_prompt.items():
        size = len(next(iter(rankings.values())))
        for first, second in (_shuffled(prompt_id, *pair) for pair in combinations(range(size), 2)):
            clusters.append(prompt_id)
            for name in names:
                ranks = rankings.get(name)
                votes[name].append(None if ranks is None else _vote(ranks[first], ranks[second]))
    strict = {name: [vote or None for vote in row] for name, row in votes.items()}
    against = {name: _majority([votes[other] for other in names if other != name], len(clusters)) for name in names}

    def share(rows: Sequence[Sequence[Vote | None]], prompts: Sequence[str]) -> Agreement:
        return pairwise_agreement(rows, clusters=prompts, resamples=resamples, seed=seed)

    return PanelAgreement(
        prompts=len(by_prompt),
        pairs=len(clusters),
        pairwise=share(list(strict.values()), clusters),
        alpha=krippendorff_alpha(list(votes.values()), clusters=clusters, resamples=resamples, seed=seed),
        annotators={name: share([strict[name], against[name]], clusters) for name in names},
        ceiling=share([[*chain(*strict.values())], [*chain(*against.values())]], clusters * len(names)),
    )


def _by_prompt(judgements: Sequence[Judgement]) -> dict[str, dict[str, tuple[int, ...]]]:
    by_prompt: dict[str, dict[str, tuple[int, ...]]] = {}
    for judgement in judgements:
        rankings = by_prompt.setdefault(judgement.prompt_id, {})
        if judgement.annotator in rankings:
            what = f"{judgement.annotator!r} judged prompt {judgement.prompt_id!r} twice."
            raise ConfigError(what, fix="Keep one judgement per annotator and prompt.")
        if any(len(ranks) != len(judgement.ranks) for ranks in rankings.values()):
            what = f"The judgements of prompt {judgement.prompt_id!r} rank different numbers of completions."
            raise ConfigError(what, fix="Let all annotators of a prompt judge the same completions.")
        rankings[judgement.annotator] = judgement.ranks
    return by_prompt


def _shuffled(prompt_id: str, first: int, second: int) -> tuple[int, int]:
    flip = hashlib.sha256(f"{first}:{second}:{prompt_id}".encode()).digest()[0] % 2
    return (second, first) if flip else (first, second)


def _vote(first: int, second: int) -> Vote:
    if first == second:
        return 0
    return 1 if first < second else -1


def _majority(rows: Sequence[Sequence[Vote | None]], items: int) -> list[Vote | None]:
    """The sign of the sum of votes; None where it is zero."""
    totals = [sum(row[item] or 0 for row in rows) for item in range(items)]
    return [None if total == 0 else 1 if total > 0 else -1 for total in totals]
