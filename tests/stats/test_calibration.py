"""Calibration against hand-derived numbers, scikit-learn, scipy's optimiser, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from accord.errors import ConfigError, EmptyDataError
from accord.stats.calibration import calibrate, fit_temperature, randomise_sides


def test_the_error_by_hand() -> None:
    """Two bins of two: p = .1, .3 with no event (gap .2), p = .6, .8 with one event (gap .2)."""
    result = calibrate(logit([0.8, 0.1, 0.6, 0.3]), [True, False, False, False], bins=2)
    assert result.error == pytest.approx(0.2)
    assert [bin.predicted for bin in result.bins] == pytest.approx([0.2, 0.7])
    assert [bin.observed for bin in result.bins] == [0.0, 0.5]
    assert [bin.n for bin in result.bins] == [2, 2]


def test_bins_are_scikit_learns_quantile_bins() -> None:
    generator = np.random.default_rng(5)
    odds = generator.normal(size=400)
    labels = generator.random(400) < expit(odds)
    observed, predicted = calibration_curve(labels, expit(odds), n_bins=8, strategy="quantile")
    result = calibrate(odds, labels, bins=8)
    assert [bin.observed for bin in result.bins] == pytest.approx(list(observed), abs=1e-12)
    assert [bin.predicted for bin in result.bins] == pytest.approx(list(predicted))
    assert result.error == pytest.approx(float(np.abs(observed - predicted).mean()))


def test_a_calibrated_model_lies_in_its_null_band_as_often_as_it_says() -> None:
    """200 draws of 95 %: a binomial gives fewer than 180 in one of 10⁴ runs. The band itself does not begin at zero."""
    generator = np.random.default_rng(0)
    odds = generator.normal(size=300)
    results = [calibrate(odds, generator.random(300) < expit(odds), simulations=200, seed=k) for k in range(200)]
    assert sum(r.null.low <= r.error <= r.null.high for r in results) >= 180
    assert results[0].null.low > 0.01


def test_overconfidence_is_outside_the_band_and_has_its_temperature() -> None:
    generator = np.random.default_rng(1)
    odds = generator.normal(size=4000)
    result = calibrate(3 * odds, generator.random(4000) < expit(odds))
    assert result.error > result.null.high
    assert result.temperature == pytest.approx(3, rel=0.1)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=40))
def test_the_temperature_is_the_minimum_of_the_log_loss(margins: list[float]) -> None:
    sample = np.array(margins)
    temperature = fit_temperature(sample)
    if temperature is None:
        assert sample.mean() <= 0 or sample.min() >= 0
        return
    loss = lambda log_t: float(np.logaddexp(0, -sample / math.exp(log_t)).mean())  # noqa: E731
    found = minimize_scalar(loss, bracket=(math.log(temperature) - 1, math.log(temperature) + 1))
    assert loss(math.log(temperature)) <= found.fun + 1e-9


def test_the_temperature_is_the_inverse_slope_of_a_logistic_regression() -> None:
    odds, labels = randomise_sides(np.random.default_rng(2).normal(0.5, 1.5, size=500), seed=3)
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(odds[:, None], labels)
    temperature = calibrate(odds, labels).temperature
    assert temperature is not None
    assert 1 / temperature == pytest.approx(float(fit.coef_[0, 0]), rel=1e-4)


def test_sides_are_drawn_evenly_and_keep_every_margin() -> None:
    margins = np.arange(1.0, 2001.0)
    odds, labels = randomise_sides(margins, seed=7)
    assert np.where(labels, odds, -odds).tolist() == margins.tolist()
    assert 900 < labels.sum() < 1100
    assert randomise_sides(margins, seed=7)[1].tolist() == labels.tolist()


def test_bad_input_is_refused() -> None:
    with pytest.raises(EmptyDataError):
        calibrate([], [])
    with pytest.raises(ConfigError):
        calibrate([1.0], [True, False])
    with pytest.raises(ConfigError):
        calibrate([math.nan], [True])
    with pytest.raises(ConfigError, match="fewer bins"):
        calibrate([1.0, 2.0], [True, False], bins=3)
