"""How good a reward model is on preference pairs it has not seen. Numbers in, record out; no model is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from accord.errors import DataError, EmptyDataError
from accord.stats.agreement import Agreement
from accord.stats.intervals import Interval, wilson

__all__ = ["Accuracy", "RewardReport", "evaluate_rewards"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of `n` pairs that are ordered as the annotators order them, a tie counting one half; Wilson interval.

    Example: ``Accuracy(0.66, Interval(0.60, 0.71), n=304)``
    """

    value: float
    interval: Interval
    n: int


@dataclass(frozen=True, slots=True)
class RewardReport:
    """Accuracy beside its baselines, and how far the scores can be read as probabilities.

    `longer_wins` prefers the longer completion. `ceiling` is how often the annotators agree with the same labels, where
    known: no model can be expected to do better. `log_loss` (nats) and `brier` score p = σ(margin) and do not depend on
    which completion is called A: swapping both turns p into 1 − p and the label with it. A model that always says one
    half has log-loss 0.693 and Brier score 0.25. `confidence` is the mean of max(p, 1 − p): above the accuracy, the
    model is over-confident. `margin` is the mean of r_chosen − r_rejected.

    Example: ``evaluate_rewards([1.2, 0.3], [0.4, 0.9])``
    """

    accuracy: Accuracy
    longer_wins: Accuracy | None
    ceiling: Agreement | None
    ties: int
    margin: float
    log_loss: float
    brier: float
    confidence: float


def evaluate_rewards(
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    chosen_lengths: Sequence[int] | None = None,
    rejected_lengths: Sequence[int] | None = None,
    ceiling: Agreement | None = None,
) -> RewardReport:
    """Compare the rewards of the chosen and the rejected completion of each pair, [pairs] each.

    Lengths are tokens (or any one unit) and give the baseline "longer wins".

    Raises:
        EmptyDataError: no pair.
        DataError: lists of different lengths, or a reward that is not finite.
    """
    chosen_B, rejected_B = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    if chosen_B.size == 0:
        raise EmptyDataError("There is no preference pair to score.", fix="Give at least one pair.")
    if chosen_B.shape != rejected_B.shape or not np.isfinite([chosen_B, rejected_B]).all():
        raise DataError("Rewards must be finite, one for each chosen and each rejected completion.")
    margin_B = chosen_B - rejected_B
    longer = None
    if chosen_lengths is not None and rejected_lengths is not None:
        if len(chosen_lengths) != margin_B.size or len(rejected_lengths) != margin_B.size:
            raise DataError("Lengths must be given for each chosen and each rejected completion.")
        longer = _accuracy(np.subtract(chosen_lengths, rejected_lengths, dtype=np.float64))
    # log σ(m) and 1 − σ(m), stable for large margins
    log_p_B = -np.logaddexp(0.0, -margin_B)
    miss_B = np.exp(-np.logaddexp(0.0, margin_B))
    return RewardReport(
        accuracy=_accuracy(margin_B),
        longer_wins=longer,
        ceiling=ceiling,
        ties=int((margin_B == 0).sum()),
        margin=float(margin_B.mean()),
        log_loss=float(-log_p_B.mean()),
        brier=float((miss_B**2).mean()),
        confidence=float(np.maximum(miss_B, 1.0 - miss_B).mean()),
    )


def _accuracy(margin_B: NDArray[np.float64]) -> Accuracy:
    """Share of positive margins, a tie counting one half.

    With an odd number of ties the wins are no whole number: the interval then spans those of its two neighbours.
    """
    n = margin_B.size
    wins = float((margin_B > 0).sum() + 0.5 * (margin_B == 0).sum())
    return Accuracy(wins / n, Interval(wilson(floor(wins), n).low, wilson(ceil(wins), n).high), n)
