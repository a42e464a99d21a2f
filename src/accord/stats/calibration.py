"""How far probabilities can be believed: proper scores, calibration error with its null band, fitted temperature.

A preference model says p = σ(z), z = r_A − r_B, that A is better. Which completion is called A must be drawn at random
(`randomise_sides`): if A were always the better one, every label would be 1 and there would be nothing to calibrate.
N = pairs, z in units of reward (nats of log-odds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

from accord.errors import ConfigError, EmptyDataError
from accord.stats.intervals import Interval, wilson

__all__ = ["Calibration", "ReliabilityBin", "calibrate", "fit_temperature", "randomise_sides"]

_Array = NDArray[np.float64]

_BINS = 10
_PER_BIN = 20
"""Fewer labels than this in a bin say little."""


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Neighbouring probabilities: their mean, and how often the event happened (Wilson interval).

    Example: ``ReliabilityBin(0.62, 0.55, Interval(0.42, 0.67), n=60)``
    """

    predicted: float
    observed: float
    interval: Interval
    n: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """`error` is the adaptive expected calibration error: the mean of |observed − predicted| over bins of equal mass
    (Nguyen and O'Connor 2015). Even a perfectly calibrated model has one above 0, so it stands beside `null`: the band
    in which 95 % of the errors of a perfectly calibrated model with these very probabilities lie.

    `temperature` divides margins to make them most likely (Guo et al. 2017): above 1 the model is over-confident.
    It is None where no finite positive one is best: every pair is right, or the margins point the wrong way.

    Example: ``calibrate([0.3, -1.2, 0.8], [True, False, True])``
    """

    error: float
    null: Interval
    temperature: float | None
    bins: tuple[ReliabilityBin, ...]


def randomise_sides(margins: Sequence[float] | _Array, seed: int = 0) -> tuple[_Array, NDArray[np.bool_]]:
    """Margins r_chosen − r_rejected as log-odds r_A − r_B with A and B drawn at random, and whether A is the chosen."""
    margin_N = np.asarray(margins, dtype=np.float64)
    chosen_is_a_N = np.random.default_rng(seed).random(margin_N.size) < 0.5
    return np.where(chosen_is_a_N, margin_N, -margin_N), chosen_is_a_N


def calibrate(
    log_odds: Sequence[float] | _Array,
    labels: Sequence[bool] | NDArray[np.bool_],
    *,
    bins: int | None = None,
    simulations: int = 1_000,
    seed: int = 0,
) -> Calibration:
    """Compare the probabilities σ(log_odds) with what happened.

    Args:
        bins: of equal mass (default: 10, fewer if a bin would hold less than 20 labels).

    Raises:
        EmptyDataError: no label.
        ConfigError: lists of different lengths, a number that is not finite, or more bins than labels.
    """
    odds_N, label_N = np.asarray(log_odds, dtype=np.float64), np.asarray(labels, dtype=np.bool_)
    if odds_N.size == 0:
        raise EmptyDataError("There is nothing to calibrate.", fix="Give at least one probability and label.")
    if odds_N.shape != label_N.shape or not np.isfinite(odds_N).all():
        raise ConfigError("Give one finite number and one label per item.")
    bins = bins or max(1, min(_BINS, odds_N.size // _PER_BIN))
    if bins > odds_N.size:
        raise ConfigError(f"{bins} bins for {odds_N.size} labels.", fix="Use fewer bins.")
    order = np.argsort(odds_N, kind="stable")
    p_N, y_N = expit(odds_N[order]), label_N[order]
    edges = np.linspace(0, p_N.size, bins + 1).round().astype(int)
    generator = np.random.default_rng(seed)
    drawn = np.array([_error(p_N, generator.random(p_N.size) < p_N, edges) for _ in range(simulations)])
    low, high = np.quantile(drawn, [0.025, 0.975])
    cells = [(p_N[a:b], y_N[a:b]) for a, b in pairwise(edges)]
    return Calibration(
        error=_error(p_N, y_N, edges),
        null=Interval(float(low), float(high)),
        temperature=fit_temperature(np.where(label_N, odds_N, -odds_N)),
        bins=tuple(
            ReliabilityBin(float(p.mean()), float(y.mean()), wilson(int(y.sum()), y.size), y.size) for p, y in cells
        ),
    )


def fit_temperature(margins: Sequence[float] | _Array) -> float | None:
    """The T > 0 that minimises the mean of −log σ(margin / T); None if none does.

    The derivative by 1/T, −mean(m·σ(−m/T)), rises in 1/T: it has a root if margins of both signs exist and their mean
    is positive.
    """
    margin_N = np.asarray(margins, dtype=np.float64)
    scale = float(np.abs(margin_N).max(initial=0.0))
    if scale == 0 or margin_N.mean() <= 0 or margin_N.min() >= 0:
        return None
    unit_N = margin_N / scale

    def slope(inverse: float) -> float:
        return -float((unit_N * expit(-unit_N * inverse)).mean())

    high = 1.0
    while slope(high) < 0:
        high *= 2
    return scale / float(brentq(slope, 0.0, high, xtol=1e-12))


def _error(p_N: _Array, y_N: NDArray[np.bool_], edges: NDArray[np.int_]) -> float:
    """Σ_bins |Σ (y − p)| / N over runs of neighbours."""
    return float(np.abs(np.add.reduceat(y_N - p_N, edges[:-1])).sum() / p_N.size)
