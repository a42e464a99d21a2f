"""Reward model accuracy, log-loss and Brier score against hand-derived numbers and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

from accord.errors import DataError, EmptyDataError
from accord.evaluate.reward import evaluate_rewards, overfit
from accord.stats.intervals import wilson


def test_by_hand() -> None:
    """Margins ln 3, −ln 3, 0, ln 3: p = ¾, ¼, ½, ¾. Accuracy (2 + ½)/4. Mean margin ln 3/4.
    Log-loss −(2·ln ¾ + ln ¼ + ln ½)/4, Brier (2·1/16 + 9/16 + 1/4)/4, confidence (3·¾ + ½)/4."""
    a = math.log(3)
    report = evaluate_rewards([a, 0, 1, a], [0, a, 1, 0], chosen_lengths=[5, 5, 1, 2], rejected_lengths=[3, 9, 4, 2])
    assert report.accuracy.value == 0.625
    assert report.ties == 1
    assert report.margin == pytest.approx(a / 4)
    assert report.log_loss == pytest.approx(-(2 * math.log(3 / 4) + math.log(1 / 4) + math.log(1 / 2)) / 4)
    assert report.brier == pytest.approx((2 / 16 + 9 / 16 + 1 / 4) / 4)
    assert report.confidence == pytest.approx((3 * 3 / 4 + 1 / 2) / 4)
    assert report.longer_wins is not None
    assert report.longer_wins.value == pytest.approx(1.5 / 4)
    assert report.ceiling is None


def test_interval_is_wilsons_and_a_half_win_spans_its_neighbours() -> None:
    whole = evaluate_rewards([1, 1, 1, 0], [0, 0, 0, 1]).accuracy
    assert whole.interval == wilson(3, 4)
    half = evaluate_rewards([1, 1, 1, 0], [0, 0, 1, 1]).accuracy
    assert half.interval == (wilson(2, 4).low, wilson(3, 4).high)


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=30), st.integers(0, 2**32 - 1))
def test_scores_do_not_depend_on_which_is_called_a(margins: list[float], seed: int) -> None:
    """scikit-learn scores p = σ(r_A − r_B) with A and B drawn at random; the record must agree for every draw."""
    swapped = np.random.default_rng(seed).random(len(margins)) < 0.5
    p = 1 / (1 + np.exp(-np.where(swapped, -np.array(margins), margins)))
    report = evaluate_rewards(margins, [0.0] * len(margins))
    assert report.log_loss == pytest.approx(log_loss(~swapped, p, labels=[False, True]))
    assert report.brier == pytest.approx(brier_score_loss(~swapped, p))


def test_extreme_margins_stay_finite() -> None:
    report = evaluate_rewards([1e4, 0], [0, 1e4])
    assert report.log_loss == pytest.approx(5e3)
    assert report.brier == pytest.approx(0.5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(EmptyDataError):
        evaluate_rewards([], [])
    with pytest.raises(DataError):
        evaluate_rewards([1.0], [1.0, 2.0])
    with pytest.raises(DataError):
        evaluate_rewards([math.nan], [1.0])
    with pytest.raises(DataError):
        evaluate_rewards([1.0], [0.0], chosen_lengths=[1, 2], rejected_lengths=[1, 2])


def test_calibration_does_not_call_every_label_one() -> None:
    """If A were always the chosen one, every label would be true and every bin observe 1."""
    margins = np.random.default_rng(0).normal(0.5, 1.0, size=400)
    calibration = evaluate_rewards(margins, np.zeros(400)).calibration
    observed = [bin.observed for bin in calibration.bins]
    assert min(observed) < 0.3 < 0.7 < max(observed)
    assert sum(bin.n for bin in calibration.bins) == 400


def test_length_by_hand() -> None:
    """Differences of length 10, −10, 0, 1 and margins 1, −1, 2, −1: slope (10 + 10 + 0 − 1)/201; matched are the last
    two (0 of 30 and 1 of 30 tokens), of which one is right; without length the margins are .05, −.05, 2, −1.09."""
    report = evaluate_rewards(
        [1, -1, 2, -1], [0, 0, 0, 0], chosen_lengths=[30, 20, 30, 30], rejected_lengths=[20, 30, 30, 29]
    )
    assert report.length is not None
    assert report.length.slope == pytest.approx(19 / 201)
    assert report.length.correlation == pytest.approx(19 / math.sqrt(201 * 7))
    assert report.length.matched is not None
    assert (report.length.matched.value, report.length.matched.n) == (0.5, 2)
    assert report.length.without.value == 0.5


def test_a_model_of_length_alone_has_nothing_left_without_it() -> None:
    generator = np.random.default_rng(1)
    chosen, rejected = generator.integers(10, 200, size=(2, 300))
    length = evaluate_rewards(chosen / 50, rejected / 50, chosen_lengths=chosen, rejected_lengths=rejected).length
    assert length is not None
    assert (length.slope, length.correlation) == pytest.approx((1 / 50, 1))


def test_slices_stand_worst_first_and_add_up() -> None:
    report = evaluate_rewards([1, 1, 1, 0, 0], [0, 0, 0, 1, 1], slices=["code", "code", "chat", "chat", "maths"])
    assert {name: (row.value, row.n) for name, row in report.slices.items()} == {
        "maths": (0.0, 1), "chat": (0.5, 2), "code": (1.0, 2)
    }  # fmt: skip
    assert list(report.slices) == ["maths", "chat", "code"]
    with pytest.raises(DataError):
        evaluate_rewards([1.0], [0.0], slices=[])


def test_overfitting_has_its_signs_and_a_good_fit_none() -> None:
    generator = np.random.default_rng(2)
    heldout = evaluate_rewards(generator.normal(0.2, 3.0, size=300), np.zeros(300))
    train = evaluate_rewards(generator.normal(6.0, 2.0, size=300), np.zeros(300))
    found = overfit(train, heldout)
    assert found.gap == pytest.approx(train.accuracy.value - heldout.accuracy.value)
    assert found.interval.low > 0
    assert len(found.signs) == 3
    honest = generator.normal(0, 1.5, size=2000)
    labels = generator.random(2000) < 1 / (1 + np.exp(-honest))
    good = [evaluate_rewards(part, np.zeros(1000)) for part in np.where(labels, honest, -honest).reshape(2, 1000)]
    assert overfit(*good).signs == ()


def test_the_interval_of_the_gap_is_statsmodels() -> None:
    from statsmodels.stats.proportion import confint_proportions_2indep

    train = evaluate_rewards([1.0] * 70 + [0.0] * 10, [0.0] * 70 + [1.0] * 10)
    heldout = evaluate_rewards([1.0] * 30 + [0.0] * 20, [0.0] * 30 + [1.0] * 20)
    low, high = confint_proportions_2indep(70, 80, 30, 50, method="newcomb")
    assert overfit(train, heldout).interval == pytest.approx((low, high), abs=1e-9)
