"""How good a reward model is on preference pairs it has not seen. Numbers in, record out; no model is loaded here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from accord.errors import DataError, EmptyDataError
from accord.stats.agreement import Agreement, pairwise_agreement
from accord.stats.calibration import Calibration, calibrate, randomise_sides
from accord.stats.intervals import Interval, bootstrap_mean, wilson
from accord.types import Content, PreferencePair, Ranking

__all__ = [
    "Accuracy",
    "EnsembleReport",
    "LengthBias",
    "Overfit",
    "RewardReport",
    "evaluate_ensemble",
    "evaluate_rewards",
    "overfit",
    "repeated_judgements",
]

_MATCHED = 0.1
"""Completions count as equally long if they differ by at most this share of the longer one."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of `n` pairs that are ordered as the annotators order them, a tie counting one half; Wilson interval.

    Example: ``Accuracy(0.66, Interval(0.60, 0.71), n=304)``
    """

    value: float
    interval: Interval
    n: int


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How much of the scores is length. Differences are chosen − rejected, in the unit of the lengths.

    `matched`: accuracy on the pairs whose lengths differ by at most a tenth of the longer one; None without any.
    `slope`: reward per unit of length, by least squares through the origin (no intercept: which completion comes first
    has no meaning). `correlation` of the margins with the differences of length, likewise. `without`: accuracy of what
    the slope leaves of the margins.

    Example: ``evaluate_rewards([1.2], [0.4], chosen_lengths=[30], rejected_lengths=[28]).length``
    """

    matched: Accuracy | None
    slope: float
    correlation: float
    without: Accuracy


@dataclass(frozen=True, slots=True)
class RewardReport:
    """Accuracy beside its baselines, and how far the scores can be read as probabilities.

    `longer_wins` prefers the longer completion. `ceiling` is how often the annotators agree with the same labels, where
    known: no model can be expected to do better. `log_loss` (nats) and `brier` score p = σ(margin) and do not depend on
    which completion is called A: swapping both turns p into 1 − p and the label with it. A model that always says one
    half has log-loss 0.693 and Brier score 0.25. `confidence` is the mean of max(p, 1 − p): above the accuracy, the
    model is over-confident. `margin` is the mean of r_chosen − r_rejected. `calibration` is measured with A and B drawn
    at random. `slices` are accuracies by a column of the data, the worst first.

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
    calibration: Calibration
    length: LengthBias | None = None
    slices: Mapping[str, Accuracy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Overfit:
    """What a reward model does better on the pairs that it was trained on than on held-out ones.

    `gap` is the difference of accuracy, training minus held-out, with Newcombe's interval for independent rates
    (Newcombe 1998, Statistics in Medicine 17:873, method 10). `inflation` is the ratio of the mean margins; None where
    the held-out one is not positive. `signs` are what of this, and of the held-out numbers alone, tells of a model that
    has learnt its rows by heart.

    Example: ``overfit(evaluate_rewards([2.0], [0.0]), evaluate_rewards([0.5], [0.7]))``
    """

    gap: float
    interval: Interval
    log_loss_train: float
    inflation: float | None
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EnsembleReport:
    """How far the members of an ensemble agree: each one's accuracy, the share of pairs that all order alike, and the
    mean over pairs of the standard deviation of their margins.

    Example: ``evaluate_ensemble([[1.0, -0.2], [0.8, 0.3]])``
    """

    members: tuple[Accuracy, ...]
    unanimous: float
    spread: float


def evaluate_ensemble(margins: Sequence[Sequence[float]]) -> EnsembleReport:
    """Compare the members' margins r_chosen − r_rejected, [members][pairs]."""
    margin_MB = np.asarray(margins, dtype=np.float64)
    signs_MB = np.sign(margin_MB)
    return EnsembleReport(
        members=tuple(_accuracy(row_B) for row_B in margin_MB),
        unanimous=float((signs_MB == signs_MB[0]).all(axis=0).mean()),
        spread=float(margin_MB.std(axis=0).mean()),
    )


def repeated_judgements(records: Sequence[PreferencePair | Ranking], *, seed: int = 0) -> Agreement | None:
    """How often two judgements of the same two completions agree: the ceiling, where pairs were judged several times.

    Where no pair was, but pairs state the probability of their order (a share of votes), it is the mean of that: how
    often one voter agrees with the order. None where the data says neither. Intervals are over prompts or pairs.
    """
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    judged: dict[tuple[Content, frozenset[Content]], list[Content]] = {}
    for pair in pairs:
        judged.setdefault((pair.prompt, frozenset([pair.chosen, pair.rejected])), []).append(pair.chosen)
    most = max(map(len, judged.values()), default=0)
    if most > 1:
        rounds = [[votes[k] if k < len(votes) else None for votes in judged.values()] for k in range(most)]
        return pairwise_agreement(rounds, clusters=[prompt for prompt, _ in judged], seed=seed)
    stated = [pair.probability for pair in pairs if pair.probability is not None]
    if not stated:
        return None
    share = float(np.mean(stated))
    return Agreement(share, bootstrap_mean(stated, seed=seed), share, len(stated))


def evaluate_rewards(
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    chosen_lengths: Sequence[int] | None = None,
    rejected_lengths: Sequence[int] | None = None,
    ceiling: Agreement | None = None,
    slices: Sequence[str] | None = None,
    seed: int = 0,
) -> RewardReport:
    """Compare the rewards of the chosen and the rejected completion of each pair, [pairs] each.

    Args:
        chosen_lengths: in tokens (or any one unit), with `rejected_lengths`: what length alone would say.
        slices: the name of the slice that each pair belongs to.
        seed: of the sides A and B, and of the band in which a calibrated model's error lies.

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
    longer = length = None
    if chosen_lengths is not None and rejected_lengths is not None:
        if len(chosen_lengths) != margin_B.size or len(rejected_lengths) != margin_B.size:
            raise DataError("Lengths must be given for each chosen and each rejected completion.")
        lengths_B2 = np.array([chosen_lengths, rejected_lengths], dtype=np.float64).T
        longer = _accuracy(lengths_B2[:, 0] - lengths_B2[:, 1])
        length = _length_bias(margin_B, lengths_B2)
    if slices is not None and len(slices) != margin_B.size:
        raise DataError("Each pair must belong to one slice.")
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
        calibration=calibrate(*randomise_sides(margin_B, seed), seed=seed),
        length=length,
        slices=_slices(margin_B, slices) if slices is not None else {},
    )


def overfit(train: RewardReport, heldout: RewardReport) -> Overfit:
    """Compare a report on the training pairs with one on held-out pairs."""
    gap = train.accuracy.value - heldout.accuracy.value
    seen, unseen = train.accuracy, heldout.accuracy
    interval = Interval(
        gap - math.hypot(seen.value - seen.interval.low, unseen.interval.high - unseen.value),
        gap + math.hypot(seen.interval.high - seen.value, unseen.value - unseen.interval.low),
    )
    signs = {
        "accuracy is lower on held-out pairs than chance explains": interval.low > 0,
        "held-out log-loss is worse than always saying one half": heldout.log_loss > math.log(2),
        "held-out calibration error lies above its null band": (
            heldout.calibration.error > heldout.calibration.null.high and (heldout.calibration.temperature or 2.0) > 1
        ),
    }
    return Overfit(
        gap=gap,
        interval=interval,
        log_loss_train=train.log_loss,
        inflation=train.margin / heldout.margin if heldout.margin > 0 else None,
        signs=tuple(sign for sign, given in signs.items() if given),
    )


def _slices(margin_B: NDArray[np.float64], names: Sequence[str]) -> dict[str, Accuracy]:
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(name, []).append(place)
    found = {name: _accuracy(margin_B[places]) for name, places in groups.items()}
    return dict(sorted(found.items(), key=lambda item: (item[1].value, item[0])))


def _length_bias(margin_B: NDArray[np.float64], lengths_B2: NDArray[np.float64]) -> LengthBias:
    longer_B = lengths_B2[:, 0] - lengths_B2[:, 1]
    matched_B = np.abs(longer_B) <= _MATCHED * lengths_B2.max(axis=1)
    products, squares = float(margin_B @ longer_B), float(longer_B @ longer_B)
    slope = products / squares if squares else 0.0
    size = math.sqrt(squares * float(margin_B @ margin_B))
    return LengthBias(
        matched=_accuracy(margin_B[matched_B]) if matched_B.any() else None,
        slope=slope,
        correlation=products / size if size else 0.0,
        without=_accuracy(margin_B - slope * longer_B),
    )


def _accuracy(margin_B: NDArray[np.float64]) -> Accuracy:
    """Share of positive margins, a tie counting one half.

    With an odd number of ties the wins are no whole number: the interval then spans those of its two neighbours.
    """
    n = margin_B.size
    wins = float((margin_B > 0).sum() + 0.5 * (margin_B == 0).sum())
    return Accuracy(wins / n, Interval(wilson(floor(wins), n).low, wilson(ceil(wins), n).high), n)
