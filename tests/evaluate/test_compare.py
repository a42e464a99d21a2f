"""Comparison against numbers derived by hand, and the symmetry that every paired comparison has."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import DataError, EmptyDataError
from accord.evaluate.compare import PairedOutcome, compare, holm


def outcome(number: int, before: bool, after: bool, kind: str = "json") -> PairedOutcome:
    return PairedOutcome(f"p-{number}", "Q", (kind,), (before,), (after,), "b", "a", 10, 8)


def table(both: int, improved: int, worsened: int, neither: int) -> list[PairedOutcome]:
    cells = [(True, True)] * both + [(False, True)] * improved + [(True, False)] * worsened + [(False, False)] * neither
    return [outcome(number, before, after) for number, (before, after) in enumerate(cells)]


def test_pass_rate_by_hand() -> None:
    """10 prompts: 1 passes both times, 7 only after, 1 only before, 1 never. Before 2/10, after 8/10, difference 6/10.
    Exact McNemar: P(at most 1 or at least 7 of 8 fair coins) = 2·(1 + 8)/256 = 0.0703. One requirement per prompt, so
    the sign-flip test of the shares counts the same coins. Holm over two: both 2·0.0703 = 0.1406."""
    result = compare(table(both=1, improved=7, worsened=1, neither=1))
    for measure in (result.pass_rate, result.requirements):
        assert measure is not None
        assert (measure.n, measure.before, measure.after) == (10, 0.2, 0.8)
        assert measure.difference == pytest.approx(0.6)
        assert measure.p_value == pytest.approx(18 / 256)
        assert measure.p_adjusted == pytest.approx(36 / 256)
        assert measure.interval.low < 0.6 < measure.interval.high
    assert (result.improved, result.worsened) == (7, 1)
    assert result.verdicts == {"pass_rate": "Can't tell", "requirements": "Can't tell", "reward": "Not measured"}
    assert result.reward is None
    assert result.kl is None


@pytest.mark.parametrize(("improved", "worsened", "verdict"), [(12, 0, "Better"), (0, 12, "Worse")])
def test_clear_changes_get_a_verdict(improved: int, worsened: int, verdict: str) -> None:
    """12 changes all one way: p = 2/4096, far below 0.05 after Holm."""
    result = compare(table(both=4, improved=improved, worsened=worsened, neither=4))
    assert result.verdicts["pass_rate"] == result.verdicts["requirements"] == verdict
    assert result.pass_rate is not None
    assert result.pass_rate.p_value == pytest.approx(2 / 4096)


def test_shares_and_kinds_by_hand() -> None:
    """p-0 meets 1 of 2 before and 2 of 2 after; p-1 meets 1 of 1 before and 0 of 1 after.
    Shares: before (½ + 1)/2 = ¾, after (1 + 0)/2 = ½. json is asked by both: before 2/2, after 1/2. p-2 asks
    for two keywords: its kind is met before only if both are."""
    rows = [
        PairedOutcome("p-0", "Q", ("json", "keyword"), (True, False), (True, True), "", "", 1, 1),
        PairedOutcome("p-1", "Q", ("json",), (True,), (False,), "", "", 1, 1),
        PairedOutcome("p-2", "Q", ("keyword", "keyword"), (True, False), (True, True), "", "", 1, 1),
    ]
    result = compare(rows[:2])
    assert result.requirements is not None
    assert (result.requirements.before, result.requirements.after) == (0.75, 0.5)
    kinds = {kind.kind: (kind.n, kind.before, kind.after) for kind in compare(rows).kinds}
    assert kinds == {"json": (2, 1.0, 0.5), "keyword": (2, 0.0, 1.0)}


def test_length_reward_and_kl_by_hand() -> None:
    """Lengths 10 → 8 and 10 → 4: mean −4. Rewards exist for one prompt only: 0.5 → 2. KL: (1 + 3)/2 = 2."""
    rows = [
        replace(outcome(0, True, True), reward_before=0.5, reward_after=2.0, kl=1.0),
        replace(outcome(1, True, True), tokens_after=4, reward_before=0.5, kl=3.0),
    ]
    result = compare(rows)
    assert (result.length.before, result.length.after, result.length.difference) == (10, 6, -4)
    assert result.length.verdict is None
    assert result.reward is not None
    assert (result.reward.n, result.reward.difference) == (1, 1.5)
    assert result.kl is not None
    assert (result.kl.n, result.kl.mean) == (2, 2.0)
    assert 1.0 <= result.kl.interval.low <= 2.0 <= result.kl.interval.high <= 3.0


def test_prompts_without_requirements_are_not_passes() -> None:
    """A prompt that asks nothing meets nothing: it counts for length, never for the pass rate."""
    nothing = PairedOutcome("free", "Q", (), (), (), "b", "a", 5, 5)
    result = compare([outcome(0, False, True), nothing])
    assert result.n == 2
    assert result.pass_rate is not None
    assert (result.pass_rate.n, result.pass_rate.before, result.pass_rate.after) == (1, 0.0, 1.0)
    assert compare([nothing]).verdicts == dict.fromkeys(("pass_rate", "requirements", "reward"), "Not measured")
    assert compare([nothing]).detectable is None


def test_detectable_effect() -> None:
    """100 prompts of which 15 change: 10.8 points, the published figure for 15 % discordance and 80 % power."""
    detectable = compare(table(both=40, improved=10, worsened=5, neither=45)).detectable
    assert detectable == pytest.approx(0.108, abs=0.001)
    assert compare(table(both=5, improved=0, worsened=0, neither=5)).detectable is None


cells = st.tuples(*[st.integers(0, 12)] * 4).filter(lambda counts: sum(counts) > 0)


@settings(deadline=None, max_examples=25)
@given(cells)
def test_swapping_before_and_after_swaps_the_verdict(counts: tuple[int, int, int, int]) -> None:
    both, improved, worsened, neither = counts
    forth, back = compare(table(both, improved, worsened, neither)), compare(table(both, worsened, improved, neither))
    assert forth.pass_rate is not None
    assert back.pass_rate is not None
    assert forth.pass_rate.difference == pytest.approx(-back.pass_rate.difference)
    assert forth.pass_rate.p_value == pytest.approx(back.pass_rate.p_value)
    opposite = {"Better": "Worse", "Worse": "Better", "Can't tell": "Can't tell"}
    assert opposite[forth.verdicts["pass_rate"]] == back.verdicts["pass_rate"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p_values: list[float]) -> None:
    """The adjusted p of a hypothesis is the largest Bonferroni p, |S|·min p, over all sets S that contain it."""
    everyone = range(len(p_values))
    sets = [chosen for size in range(1, len(p_values) + 1) for chosen in combinations(everyone, size)]
    expected = [
        max(min(1.0, len(chosen) * min(p_values[i] for i in chosen)) for chosen in sets if index in chosen)
        for index in everyone
    ]
    assert holm(p_values) == pytest.approx(expected)


def test_bad_outcomes_are_named() -> None:
    with pytest.raises(EmptyDataError):
        compare([])
    with pytest.raises(DataError, match=r"p-1.*Two outcomes"):
        compare([outcome(1, True, True), outcome(1, True, False)])
    with pytest.raises(DataError, match="p-0"):
        compare([replace(outcome(0, True, True), met_after=())])
    with pytest.raises(DataError, match="p-0"):
        compare([replace(outcome(0, True, True), kl=math.nan)])
