"""Wilson against statsmodels and the defining quadratic; the BCa bootstrap against scipy and its coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap
from statsmodels.stats.proportion import proportion_confint

from accord.errors import ConfigError, EmptyDataError
from accord.stats import bootstrap_mean, wilson


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_wilson_equals_statsmodels(case, confidence):
    successes, n = case
    expected = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx(expected, abs=1e-12)


def test_wilson_ends_solve_the_score_equation():
    """|7/20 - p| = 1.96 √(p(1-p)/20) at both ends."""
    for p in wilson(7, 20):
        assert abs(0.35 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 20), rel=1e-6)


def test_wilson_touches_the_border_only_at_none_and_all():
    assert wilson(0, 10).low == 0 < wilson(1, 10).low
    assert wilson(10, 10).high == 1 > wilson(9, 10).high


@pytest.mark.parametrize("arguments", [(-1, 3), (4, 3), (1, 3, 1.0), (1, 3, 0.0)])
def test_wilson_refuses_impossible_counts(arguments):
    with pytest.raises(ConfigError):
        wilson(*arguments)


def test_nothing_has_no_interval():
    with pytest.raises(EmptyDataError):
        wilson(0, 0)
    with pytest.raises(EmptyDataError):
        bootstrap_mean([])


@pytest.mark.parametrize("shape", ["normal", "skewed", "binary"])
def test_bca_agrees_with_scipy(shape):
    """Two independent bootstraps of 20,000 draws differ by Monte Carlo noise only: under 3 % of the width."""
    generator = np.random.default_rng(3)
    sample = {
        "normal": generator.normal(2, 1, 40),
        "skewed": generator.exponential(1, 40),
        "binary": (generator.random(60) < 0.2).astype(float),
    }[shape]
    ours = bootstrap_mean(sample, resamples=20_000)
    theirs = bootstrap((sample,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(4))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    # A binary mean moves in steps of 1/60: its quantiles may differ by one step.
    tolerance = 0.03 * width + (1 / 60 if shape == "binary" else 0)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=tolerance)


def test_bca_covers_the_mean_of_skewed_samples():
    """95 % nominal, 300 exponential samples of 40: at least 90 % contain the mean (binomial noise is 1.3 %)."""
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        low, high = bootstrap_mean(generator.exponential(1, 40), resamples=1_000, seed=trial)
        inside += low <= 1 <= high
    assert 0.90 <= inside / 300 <= 0.99


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_bca_stays_within_the_sample(values):
    low, high = bootstrap_mean(values, resamples=200)
    slack = 1e-9 * max(map(abs, values), default=0)
    assert min(values) - slack <= low <= high <= max(values) + slack


def test_equal_values_have_no_width_and_a_seed_repeats():
    assert bootstrap_mean([0.5]) == bootstrap_mean([0.5, 0.5, 0.5]) == (0.5, 0.5)
    values = [0.0, 1.0, 4.0, 9.0]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(bad):
    with pytest.raises(ConfigError, match="Value 1 of 3"):
        bootstrap_mean([1.0, bad, 2.0])
