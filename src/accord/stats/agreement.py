"""How far annotators agree: observed agreement, Cohen's κ, Krippendorff's α, each with a bootstrap interval.

Every measure here is a function of a table that adds up over items. The interval is the percentile bootstrap: whole
clusters (prompts) are drawn again, because the items of one prompt are not independent, and their tables summed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from accord.errors import ConfigError
from accord.stats.intervals import Interval

__all__ = ["Agreement", "Level", "cohen_kappa", "krippendorff_alpha", "pairwise_agreement"]

Level = Literal["nominal", "ordinal", "interval"]
Ratings = Sequence[Sequence[Hashable | None]]
"""One row per annotator, one column per item; None where the annotator did not label the item."""

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Agreement:
    """A measure of agreement. `value` is None where it is undefined, and `reason` then says why.

    `observed` is the plain share of equal labels among the `pairs` of labels that two annotators gave to one item.
    `interval` is None with fewer than two clusters, or if most resamples leave the measure undefined.
    """

    value: float | None
    interval: Interval | None
    observed: float | None
    pairs: int
    reason: str | None = None


def pairwise_agreement(
    ratings: Ratings,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Agreement:
    """The share of equal labels among all pairs of labels given to one item; every pair counts once.

    `clusters` names the prompt of each item (default: every item its own).
    """
    counts, _ = _counts(ratings)
    tables = _by_cluster(_pair_counts(counts), clusters)
    return _measure(tables, _share, counts, resamples, confidence, seed)


def cohen_kappa(
    first: Sequence[Hashable | None],
    second: Sequence[Hashable | None],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Agreement:
    """κ = (observed - expected) / (1 - expected) of two annotators' nominal labels (Cohen 1960)."""
    counts, values = _counts([first, second])
    codes = {value: code for code, value in enumerate(values)}
    confusion = np.zeros((len(first), len(values), len(values)))
    for item, (one, two) in enumerate(zip(first, second, strict=True)):
        if one is not None and two is not None:
            confusion[item, codes[one], codes[two]] = 1
    return _measure(_by_cluster(confusion, clusters), _kappa, counts, resamples, confidence, seed)


def krippendorff_alpha(
    ratings: Ratings,
    level: Level = "nominal",
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Agreement:
    """α = 1 - observed / expected disagreement (Krippendorff 2011), for any number of annotators and missing labels.

    Labels of the levels ordinal and interval are numbers. Undefined if all labels are equal, or none can be paired.
    """
    if level not in ("nominal", "ordinal", "interval"):
        raise ConfigError(f"Unknown level {level!r}. Known: nominal, ordinal, interval.")
    counts, values = _counts(ratings, numeric=level != "nominal")
    labels = counts.sum(axis=1)
    weight = np.where(labels > 1, 1 / np.maximum(labels - 1, 1), 0.0)
    diagonal = counts[:, :, None] * np.eye(len(values))
    coincidences = (counts[:, :, None] * counts[:, None, :] - diagonal) * weight[:, None, None]
    points = np.array([float(str(value)) for value in values]) if level == "interval" else np.zeros(len(values))

    def alpha(tables: _Array) -> _Array:
        return _alpha(tables, level, points)

    return _measure(_by_cluster(coincidences, clusters), alpha, counts, resamples, confidence, seed)


def _share(tables: _Array) -> _Array:
    return _divide(tables[..., 0], tables[..., 1])


def _kappa(tables: _Array) -> _Array:
    total = tables.sum(axis=(-2, -1))
    observed = _divide(np.trace(tables, axis1=-2, axis2=-1), total)
    expected = _divide((tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1), total**2)
    return _divide(observed - expected, 1 - expected)


def _alpha(tables: _Array, level: Level, points: _Array) -> _Array:
    marginals = tables.sum(axis=-1)
    if level == "nominal":
        distance = 1 - np.eye(tables.shape[-1])
    elif level == "interval":
        distance = (points[:, None] - points[None, :]) ** 2
    else:
        middle = np.cumsum(marginals, axis=-1) - marginals / 2
        distance = (middle[..., :, None] - middle[..., None, :]) ** 2
    observed = (tables * distance).sum(axis=(-2, -1))
    expected = (marginals[..., :, None] * marginals[..., None, :] * distance).sum(axis=(-2, -1))
    return 1 - (marginals.sum(axis=-1) - 1) * _divide(observed, expected)


def _divide(numerator: _Array, denominator: _Array) -> _Array:
    """NaN where the denominator vanishes (up to rounding)."""
    undefined = np.abs(denominator) < 1e-12
    return np.where(undefined, np.nan, numerator / np.where(undefined, 1, denominator))


def _measure(
    tables: _Array,
    statistic: Callable[[_Array], _Array],
    counts: _Array,
    resamples: int,
    confidence: float,
    seed: int,
) -> Agreement:
    equal, pairs = _pair_counts(counts).sum(axis=0)
    if pairs == 0:
        return Agreement(None, None, None, 0, "no item has labels from two annotators")
    observed = float(equal / pairs)
    value = float(statistic(tables.sum(axis=0)))
    if np.isnan(value):
        reason = "all labels are the same, so chance alone would agree as often"
        return Agreement(None, None, observed, int(pairs), reason)
    interval = _percentile(tables, statistic, resamples, confidence, seed)
    return Agreement(value, interval, observed, int(pairs))


def _percentile(
    tables: _Array, statistic: Callable[[_Array], _Array], resamples: int, confidence: float, seed: int
) -> Interval | None:
    clusters = len(tables)
    if clusters < 2:
        return None
    draws = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    values = statistic(np.tensordot(draws.astype(np.float64), tables, axes=1))
    defined = values[np.isfinite(values)]
    if 2 * len(defined) < resamples:
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _counts(ratings: Ratings, numeric: bool = False) -> tuple[_Array, list[Hashable]]:
    """How many annotators gave each label to each item, [items × labels], and the labels (sorted if numbers)."""
    lengths = {len(row) for row in ratings}
    if len(lengths) != 1:
        what = f"The annotators' rows have {len(lengths)} different lengths: {sorted(lengths)}."
        raise ConfigError(what, fix="Give one row per annotator with one entry per item, None where there is no label.")
    values: list[Hashable] = list(dict.fromkeys(value for row in ratings for value in row if value is not None))
    if any(value != value for value in values):
        raise ConfigError("A label is NaN.", fix="Write None where there is no label.")
    if numeric:
        wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]
        if wrong:
            fix = 'Use level="nominal", or numbers; None where there is no label.'
            raise ConfigError(f"The label {wrong[0]!r} is not a number.", fix=fix)
        values = sorted(values, key=lambda value: float(str(value)))
    codes = {value: code for code, value in enumerate(values)}
    counts = np.zeros((lengths.pop(), len(values)))
    for row in ratings:
        for item, value in enumerate(row):
            if value is not None:
                counts[item, codes[value]] += 1
    return counts, values


def _pair_counts(counts: _Array) -> _Array:
    """[items × 2]: equal pairs, all pairs."""
    labels = counts.sum(axis=1)
    equal = (counts * (counts - 1)).sum(axis=1) / 2
    return np.stack([equal, labels * (labels - 1) / 2], axis=1)


def _by_cluster(tables: _Array, clusters: Sequence[Hashable] | None) -> _Array:
    """Sum the items' tables within each cluster; clusters without any entry are left out."""
    if clusters is not None:
        if len(clusters) != len(tables):
            raise ConfigError(f"{len(clusters)} clusters for {len(tables)} items.", fix="Name one cluster per item.")
        index = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
        summed = np.zeros((len(index), *tables.shape[1:]))
        np.add.at(summed, [index[name] for name in clusters], tables)
        tables = summed
    return tables[tables.reshape(len(tables), -1).any(axis=1)] if tables.size else tables
