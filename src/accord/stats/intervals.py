"""Confidence intervals for a rate and for a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from accord.errors import ConfigError, EmptyDataError

__all__ = ["Interval", "bootstrap_mean", "wilson"]

_CHUNK = 2_000_000
"""Resampled values held in memory at once: 16 MB of float64."""


class Interval(NamedTuple):
    """A confidence interval, ends included.

    Example: ``Interval(0.43, 0.61)``
    """

    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a rate (Wilson 1927): sensible at 0 and n successes, too.

    Raises:
        EmptyDataError: n is 0.
        ConfigError: successes outside 0…n, or confidence outside (0, 1).
    """
    if n < 1:
        raise EmptyDataError("A rate of nothing has no interval (n = 0).", fix="Evaluate at least one item.")
    if not 0 <= successes <= n:
        raise ConfigError(f"{successes} successes in {n} trials.", fix="Count successes between 0 and n.")
    z = normal_quantile(confidence)
    rate, shrink = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / shrink
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return Interval(low, 1.0 if successes == n else min(1.0, centre + half))


def bootstrap_mean(
    values: Sequence[float] | NDArray[np.float64],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bias-corrected and accelerated (BCa) bootstrap interval of the mean (Efron 1987); the unit is one value.

    Equal values (or a single one) give an interval of no width: the sample shows no variation to resample.

    Raises:
        EmptyDataError: no value.
        ConfigError: a value that is not finite, or confidence outside (0, 1).
    """
    sample = as_sample(values)
    z = normal_quantile(confidence)
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, mean)
    means = _resampled_means(sample, resamples, seed)
    # Half of the ties count as below: a discrete mean is then not biased by its own atoms.
    below = float((means < mean).mean() + (means == mean).mean() / 2)
    below = min(max(below, 0.5 / resamples), 1 - 0.5 / resamples)
    bias = float(ndtri(below))
    deviation = sample - mean
    # The jackknife means differ from their mean by -deviation/(n-1): the acceleration is a scaled skewness.
    acceleration = float((deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5))
    levels = [_bca_level(bias, acceleration, quantile) for quantile in (-z, z)]
    low, high = np.quantile(means, levels)
    return Interval(float(low), float(high))


def _bca_level(bias: float, acceleration: float, z: float) -> float:
    """Which quantile of the resampled means to take; beyond the pole of BCa's formula, the outermost."""
    stretch = 1 - acceleration * (bias + z)
    if stretch <= 0:
        return 0.0 if z < 0 else 1.0
    return float(ndtr(bias + (bias + z) / stretch))


def _resampled_means(sample: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    n = len(sample)
    rows = max(1, _CHUNK // n)
    pieces = [
        sample[generator.integers(0, n, (min(rows, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(pieces)


def normal_quantile(confidence: float) -> float:
    """The two-sided standard normal quantile: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence} is not between 0 and 1.", fix="Use e.g. 0.95.")
    return float(ndtri((1 + confidence) / 2))


def as_sample(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """A non-empty one-dimensional array of finite numbers, or a clear error."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1:
        raise ConfigError(f"Expected a list of numbers, got an array of shape {sample.shape}.")
    if sample.size == 0:
        raise EmptyDataError("No values to average.", fix="Evaluate at least one item.")
    wrong = np.flatnonzero(~np.isfinite(sample))
    if wrong.size:
        raise ConfigError(
            f"Value {int(wrong[0])} of {sample.size} is {sample[wrong[0]]}.", fix="Leave out what was not measured."
        )
    return sample
