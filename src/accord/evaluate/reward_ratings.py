"""How well a reward model predicts ratings that it has not seen, attribute by attribute. Numbers in, record out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from accord.errors import DataError
from accord.stats.intervals import Interval, normal_quantile

__all__ = ["AttributeReport", "evaluate_attribute"]


@dataclass(frozen=True, slots=True)
class AttributeReport:
    """Predicted and given ratings of one attribute, in its own units.

    `rmse` is the root mean squared error; `mean_rmse` that of always saying the mean of the training data: a model must
    beat it to have learnt anything. `spearman` is the rank correlation of predicted with given ratings, with its
    interval by Fisher's z and the variance of Bonett and Wright (2000); None where either is constant, the interval
    also for fewer than four ratings.

    Example: ``evaluate_attribute("truth", [2.1, 3.9, 1.0], [2, 4, 0], mean=2.4)``
    """

    name: str
    n: int
    rmse: float
    mean_rmse: float
    spearman: float | None
    interval: Interval | None


def evaluate_attribute(name: str, predicted: Sequence[float], given: Sequence[float], mean: float) -> AttributeReport:
    """Compare predictions with ratings, [ratings] each.

    Args:
        mean: of the attribute in the training data.

    Raises:
        DataError: no rating, lists of different lengths, or a number that is not finite.
    """
    predicted_R, given_R = np.asarray(predicted, np.float64), np.asarray(given, np.float64)
    if not given_R.size or predicted_R.shape != given_R.shape or not np.isfinite([predicted_R, given_R]).all():
        raise DataError("Predictions must be finite, one for each rating, and there must be one.", where=name)
    constant = np.ptp(predicted_R) == 0 or np.ptp(given_R) == 0
    rank = None if constant else float(spearmanr(predicted_R, given_R).statistic)
    return AttributeReport(
        name=name,
        n=given_R.size,
        rmse=_root_mean_square(predicted_R - given_R),
        mean_rmse=_root_mean_square(given_R - mean),
        spearman=rank,
        interval=_interval(rank, given_R.size) if rank is not None and given_R.size > 3 else None,
    )


def _root_mean_square(error_R: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(error_R**2)))


def _interval(rank: float, n: int) -> Interval:
    """tanh(artanh ρ ± z·√((1 + ρ²/2)/(n − 3))); of a perfect order, that order."""
    if abs(rank) >= 1 - 1e-12:
        return Interval(rank, rank)
    half = normal_quantile(0.95) * math.sqrt((1 + rank**2 / 2) / (n - 3))
    return Interval(math.tanh(math.atanh(rank) - half), math.tanh(math.atanh(rank) + half))
