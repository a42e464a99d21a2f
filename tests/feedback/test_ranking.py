"""Ranks, Borda counts and derived pairs: hand-counted and as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.errors import ConfigError, EmptyDataError
from accord.feedback import majority_ranking, rank, ranked_pairs
from accord.types import Judgement

scores = st.lists(st.floats(-10, 10), min_size=1, max_size=8)


def judgements(*rankings):
    return [Judgement("p", f"a{place}", "human", tuple(ranks)) for place, ranks in enumerate(rankings)]


@given(scores, st.floats(0, 2))
def test_ranks_are_dense_and_follow_the_scores(values, dead_zone):
    ranks = rank(values, dead_zone)
    assert set(ranks) == set(range(max(ranks) + 1))
    for group in set(ranks):
        members = [value for value, place in zip(values, ranks, strict=True) if place == group]
        assert max(members) - min(members) <= dead_zone
        below = [value for value, place in zip(values, ranks, strict=True) if place > group]
        assert all(max(members) - value > dead_zone for value in below)


@given(scores.flatmap(lambda values: st.tuples(st.just(values), st.permutations(range(len(values))))))
def test_ranking_does_not_depend_on_order(case):
    values, order = case
    ranks = rank(values, 0.5)
    assert rank([values[index] for index in order], 0.5) == tuple(ranks[index] for index in order)


def test_the_majority_by_hand():
    """Mean places with ties shared: (1 + 1.5 + 2)/3 = 1.5, (2 + 1.5 + 1)/3 = 1.5, (3 + 3 + 3)/3 = 3."""
    assert majority_ranking(judgements((0, 1, 2), (0, 0, 1), (1, 0, 2))) == (0, 0, 1)


def test_one_of_three_does_not_break_a_tie_but_two_do():
    assert majority_ranking(judgements((0, 0), (0, 0), (0, 1))) == (0, 0)
    assert majority_ranking(judgements((0, 1), (0, 1), (1, 0))) == (0, 0)
    assert majority_ranking(judgements((0, 1), (0, 1), (0, 0))) == (0, 1)
    assert majority_ranking(judgements((0, 1), (0, 1), (1, 0)), margin=0.0) == (0, 1)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_a_unanimous_panel_keeps_its_strict_order(ranks):
    together = majority_ranking(judgements(ranks, ranks, ranks))
    for i, first in enumerate(ranks):
        for j, second in enumerate(ranks):
            assert (together[i] < together[j]) == (first < second)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_pairs_are_all_strict_comparisons_widest_first(ranks):
    pairs = ranked_pairs(ranks)
    everything = {(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b}
    assert set(pairs) == everything
    assert len(pairs) == len(everything)
    gaps = [ranks[rejected] - ranks[chosen] for chosen, rejected in pairs]
    assert gaps == sorted(gaps, reverse=True)


def test_judgements_that_do_not_belong_together_are_refused():
    with pytest.raises(EmptyDataError):
        majority_ranking([])
    with pytest.raises(ConfigError):
        majority_ranking(judgements((0, 1), (0, 1, 2)))
    with pytest.raises(ConfigError):
        majority_ranking([Judgement("p", "a", "human", (0, 1)), Judgement("q", "b", "human", (0, 1))])
