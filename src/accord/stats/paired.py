"""Before and after on the same prompts: paired differences, their intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import binomtest

from accord.errors import ConfigError
from accord.stats.intervals import Interval, as_sample, bootstrap_mean, wilson

__all__ = ["PairedBinary", "PairedMean", "minimum_detectable_effect", "paired_binary", "paired_mean"]

_EXACT_UP_TO = 14
"""So many non-zero differences are permuted exhaustively (2^14 sign patterns); above, at random."""


@dataclass(frozen=True, slots=True)
class PairedBinary:
    """A rate before and after. `improved`: failed before and passed after; `worsened`: the reverse."""

    n: int
    before: float
    after: float
    difference: float
    interval: Interval
    p_value: float
    improved: int
    worsened: int


@dataclass(frozen=True, slots=True)
class PairedMean:
    """A mean before and after."""

    n: int
    before: float
    after: float
    difference: float
    interval: Interval
    p_value: float


def paired_binary(before: Sequence[bool], after: Sequence[bool], *, confidence: float = 0.95) -> PairedBinary:
    """Compare pass or fail on the same items.

    p is McNemar's exact two-sided test. The interval is Newcombe's square-and-add of two Wilson intervals with the
    correlation φ, corrected for continuity (Newcombe 1998, Statistics in Medicine 17:2635, method 10).

    Raises:
        EmptyDataError: no item.
        ConfigError: lists of different lengths, or values other than true and false.
    """
    first, second = _binary(before, "before"), _binary(after, "after")
    _same_length(first, second)
    n = len(first)
    both = int((first & second).sum())
    improved, worsened = int((~first & second).sum()), int((first & ~second).sum())
    neither = n - both - improved - worsened
    rate_before, rate_after = (both + worsened) / n, (both + improved) / n
    difference = (improved - worsened) / n
    low_before, high_before = wilson(both + worsened, n, confidence)
    low_after, high_after = wilson(both + improved, n, confidence)
    correlation = _newcombe_correlation(both, worsened, improved, neither)

    def half(to_after: float, to_before: float) -> float:
        return math.sqrt(max(0.0, to_after**2 - 2 * correlation * to_after * to_before + to_before**2))

    interval = Interval(
        max(-1.0, difference - half(rate_after - low_after, high_before - rate_before)),
        min(1.0, difference + half(high_after - rate_after, rate_before - low_before)),
    )
    changed = improved + worsened
    p_value = float(binomtest(improved, changed).pvalue) if changed else 1.0
    return PairedBinary(n, rate_before, rate_after, difference, interval, p_value, improved, worsened)


def _newcombe_correlation(a: int, b: int, c: int, d: int) -> float:
    """φ of the fourfold table with ad - bc brought n/2 towards 0 when positive; 0 if a margin is empty."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    product = a * d - b * c
    corrected = max(product - (a + b + c + d) / 2, 0.0) if product > 0 else float(product)
    return corrected / math.sqrt(margins)


def paired_mean(
    before: Sequence[float],
    after: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedMean:
    """Compare a number on the same items, one item per prompt.

    The interval is BCa over the items' differences. p is the two-sided sign-flip permutation test: exact up to 14
    non-zero differences, else over `resamples` random flips, the observed one counted.

    Raises:
        EmptyDataError: no item.
        ConfigError: lists of different lengths, or a value that is not finite.
    """
    first, second = as_sample(before), as_sample(after)
    _same_length(first, second)
    change = second - first
    interval = bootstrap_mean(change, confidence=confidence, resamples=resamples, seed=seed)
    p_value = _sign_flip(change[change != 0], resamples, seed)
    means = float(first.mean()), float(second.mean())
    return PairedMean(len(change), *means, float(change.mean()), interval, p_value)


def _sign_flip(change: NDArray[np.float64], resamples: int, seed: int) -> float:
    if change.size == 0:
        return 1.0
    observed = abs(change.sum())
    # Sums of the same numbers in another order differ in the last bits.
    threshold = observed - 1e-12 * np.abs(change).sum()
    if change.size <= _EXACT_UP_TO:
        sums = np.zeros(1)
        for value in change:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= threshold).mean())
    generator = np.random.default_rng(seed)
    edges = [*range(0, resamples, 1_000), resamples]
    hits = 0
    for start, stop in pairwise(edges):
        signs = generator.integers(0, 2, (stop - start, change.size)) * 2 - 1
        hits += int((np.abs(signs @ change) >= threshold).sum())
    return (hits + 1) / (resamples + 1)


def minimum_detectable_effect(n: int, discordance: float, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest true difference of two paired rates that a study of n items would notice with this power.

    `discordance` is the share of items that differ between before and after. Normal approximation (Connor 1987):
    (z_confidence·√ψ + z_power·√(ψ - δ²)) / √n = δ, solved for δ. It is 1 if even the largest possible
    difference, δ = ψ, would go unnoticed.

    Raises:
        ConfigError: n below 1, or a share outside (0, 1].
    """
    if n < 1 or not 0 < discordance <= 1 or not 0 < power < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"n = {n}, discordance = {discordance}, power = {power}, confidence = {confidence}.",
            fix="Give n ≥ 1, discordance in (0, 1], power and confidence in (0, 1).",
        )
    z_alpha, z_power = float(ndtri((1 + confidence) / 2)), float(ndtri(power))
    # Squaring gives a quadratic in δ: (n + z_power²)·δ² - 2·√n·z_alpha·√ψ·δ + ψ·(z_alpha² - z_power²) = 0.
    a, half_b, c = (
        n + z_power**2,
        math.sqrt(n * discordance) * z_alpha,
        discordance * (z_alpha**2 - z_power**2),
    )
    sign = 1 if z_power >= 0 else -1
    effect = (half_b + sign * math.sqrt(max(0.0, half_b**2 - a * c))) / a
    return effect if effect <= discordance else 1.0


def _binary(values: Sequence[bool], name: str) -> NDArray[np.bool_]:
    sample = as_sample([float(value) for value in values])
    if not np.isin(sample, (0.0, 1.0)).all():
        raise ConfigError(f"{name} holds other values than true and false.", fix="Use paired_mean for numbers.")
    return sample.astype(np.bool_)


def _same_length(first: NDArray[np.generic], second: NDArray[np.generic]) -> None:
    if len(first) != len(second):
        what = f"{len(first)} items before, {len(second)} after: they cannot be paired."
        raise ConfigError(what, fix="Compare both models on the same prompts, in the same order.")
