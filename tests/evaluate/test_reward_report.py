"""Reward model accuracy, log-loss and Brier score against hand-derived numbers and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

from accord.errors import DataError, EmptyDataError
from accord.evaluate.reward import evaluate_rewards
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
