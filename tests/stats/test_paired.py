"""Paired comparisons against statsmodels, scipy, full enumeration and simulated coverage."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep

from accord.errors import ConfigError, EmptyDataError
from accord.stats import minimum_detectable_effect, paired_binary, paired_mean, wilson


def from_table(both, worsened, improved, neither):
    before = [True] * (both + worsened) + [False] * (improved + neither)
    after = [True] * both + [False] * worsened + [True] * improved + [False] * neither
    return before, after


tables = st.tuples(*[st.integers(0, 40)] * 4).filter(sum)


@given(tables)
def test_mcnemar_equals_statsmodels(table):
    both, worsened, improved, neither = table
    result = paired_binary(*from_table(*table))
    assert (result.n, result.improved, result.worsened) == (sum(table), improved, worsened)
    assert result.after - result.before == pytest.approx(result.difference)
    if improved + worsened:
        expected = mcnemar([[both, worsened], [improved, neither]], exact=True).pvalue
        assert result.p_value == pytest.approx(min(1.0, expected), rel=1e-9)
    else:
        assert result.p_value == 1


@given(tables)
def test_the_paired_interval_holds_the_difference_and_mirrors(table):
    before, after = from_table(*table)
    there, back = paired_binary(before, after), paired_binary(after, before)
    assert -1 <= there.interval.low <= there.difference <= there.interval.high <= 1
    assert back.interval == pytest.approx((-there.interval.high, -there.interval.low), abs=1e-12)


def test_without_correlation_the_interval_is_newcombes_for_independent_samples():
    """ad = bc gives φ = 0, and method 10 becomes the square-and-add interval of two independent samples."""
    result = paired_binary(*from_table(8, 12, 16, 24))
    expected = confint_proportions_2indep(24, 60, 20, 60, compare="diff", method="newcomb")
    assert result.interval == pytest.approx(expected, abs=1e-9)


def test_the_interval_by_hand():
    """a, b, c, d = 20, 4, 12, 14: n = 50, rates 24/50 and 32/50, ad - bc = 232, minus n/2 is 207."""
    result = paired_binary(*from_table(20, 4, 12, 14))
    phi = 207 / math.sqrt(24 * 26 * 32 * 18)
    (l1, u1), (l2, u2) = wilson(24, 50), wilson(32, 50)
    down, up = (0.64 - l2, u1 - 0.48), (u2 - 0.64, 0.48 - l1)
    low = 0.16 - math.sqrt(down[0] ** 2 - 2 * phi * down[0] * down[1] + down[1] ** 2)
    high = 0.16 + math.sqrt(up[0] ** 2 - 2 * phi * up[0] * up[1] + up[1] ** 2)
    assert result.interval == pytest.approx((low, high), abs=1e-12)


def test_the_paired_interval_covers():
    """95 % nominal, n = 60, correlated answers, true difference 0.1: 1,500 trials cover 93 to 97.5 %."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(1_500):
        table = generator.multinomial(60, [0.35, 0.15, 0.25, 0.25])
        low, high = paired_binary(*from_table(*table)).interval
        inside += low <= 0.1 <= high
    assert 0.93 <= inside / 1_500 <= 0.975


def test_no_change_is_no_evidence():
    result = paired_binary([True, False] * 30, [True, False] * 30)
    assert (result.difference, result.p_value) == (0, 1)
    assert result.interval.low < 0 < result.interval.high


@settings(max_examples=40)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_sign_flips_equal_full_enumeration(changes):
    observed = abs(sum(changes))
    sums = [
        abs(sum(sign * x for sign, x in zip(signs, changes, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(changes))
    ]
    expected = sum(total >= observed for total in sums) / len(sums)
    assert paired_mean([0] * len(changes), changes, resamples=50).p_value == pytest.approx(expected)


def test_sign_flips_equal_scipy_on_a_large_sample():
    """Both are Monte Carlo with 10,000 flips: standard error below 0.005."""
    generator = np.random.default_rng(5)
    before = generator.normal(0, 1, 60)
    after = before + generator.normal(0.15, 1, 60)
    expected = permutation_test(
        (before, after),
        lambda x, y, axis: (y - x).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        rng=np.random.default_rng(6),
    ).pvalue
    result = paired_mean(before, after)
    assert result.p_value == pytest.approx(expected, abs=0.02)
    assert result.interval.low < result.difference < result.interval.high
    assert result.difference == pytest.approx(after.mean() - before.mean())


def test_sign_flip_is_calibrated():
    """Under no effect, p < 0.1 in about a tenth of 300 trials (±3 standard errors)."""
    generator = np.random.default_rng(7)
    small = 0
    for trial in range(300):
        change = generator.normal(0, 1, 30)
        small += paired_mean(np.zeros(30), change, resamples=500, seed=trial).p_value < 0.1
    assert small / 300 == pytest.approx(0.1, abs=0.052)


@pytest.mark.parametrize(("n", "points"), [(100, 10.8), (250, 6.9), (500, 4.8), (1000, 3.4), (2000, 2.4)])
def test_minimum_detectable_effect_at_fifteen_percent_discordance(n, points):
    """(1.96 + 0.84)·√(0.15/n), a little less because the second variance is ψ - δ²."""
    assert 100 * minimum_detectable_effect(n, 0.15) == pytest.approx(points, abs=0.1)


def test_the_detectable_effect_is_detected_with_that_power():
    """250 pairs at 30 % discordance: McNemar's test (mid-point between exact and asymptotic) notices δ about 80 %."""
    delta = minimum_detectable_effect(250, 0.3)
    generator = np.random.default_rng(2)
    up, down = (0.3 + delta) / 2, (0.3 - delta) / 2
    draws = generator.multinomial(250, [up, down, 0.7], size=20_000)
    z = (draws[:, 0] - draws[:, 1]) / np.sqrt(np.maximum(draws[:, 0] + draws[:, 1], 1))
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=0.02)


def test_the_detectable_effect_solves_its_equation_and_falls_with_n():
    effects = [minimum_detectable_effect(n, 0.2) for n in (50, 100, 200, 400)]
    assert effects == sorted(effects, reverse=True)
    delta = effects[1]
    assert 10 * delta == pytest.approx(1.959964 * math.sqrt(0.2) + 0.841621 * math.sqrt(0.2 - delta**2), rel=1e-5)
    assert minimum_detectable_effect(5, 0.05) == 1


def test_unpaired_or_wrong_data_is_refused():
    with pytest.raises(ConfigError, match="same prompts"):
        paired_binary([True], [True, False])
    with pytest.raises(ConfigError, match="same prompts"):
        paired_mean([1.0], [1.0, 2.0])
    with pytest.raises(ConfigError, match="paired_mean"):
        paired_binary([0.5], [1])
    with pytest.raises(EmptyDataError):
        paired_binary([], [])
    with pytest.raises(ConfigError):
        minimum_detectable_effect(100, 0.0)
