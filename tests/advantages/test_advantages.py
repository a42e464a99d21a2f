"""Advantages: by hand, against TRL's formulas, against naive loops, and in expectation by enumeration."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from accord.advantages import (
    ADVANTAGES,
    Credit,
    Group,
    adapted,
    is_idle,
    kl_of,
    overlong_penalty,
    token_weights,
)
from accord.errors import ConfigError, RunError

NAN = float("nan")
SCORES = [[1.0, 0.0, 0.0, 1.0], [0.3, 0.7, NAN, -2.0], [NAN, NAN, NAN, NAN], [NAN, 4.0, NAN, NAN], [0.1, 0.1, 0.1, 0.1]]


def group(scores: Any, lengths: Any = None, **fields: Any) -> Group:
    return Group(np.array(scores, float), tuple(lengths or [2] * len(scores)), **fields)


def first(credits: list[list[Credit]]) -> list[list[float]]:
    """The advantage of every completion, which all its tokens share."""
    assert all(len(set(c.advantage_L.tolist())) == 1 for row in credits for c in row)
    return [[float(c.advantage_L[0]) for c in row] for row in credits]


def compute(name: str, groups: list[Group], **settings: Any) -> list[list[Credit]]:
    return ADVANTAGES[name].bind(settings)(groups)


def test_group_relative_by_hand() -> None:
    """Scores 2, 0, 1: mean 1, variance with n − 1 = 1. Without a scale the differences themselves."""
    assert first(compute("group_relative", [group([2, 0, 1])]))[0] == pytest.approx([0.9999, -0.9999, 0.0], abs=1e-6)
    assert first(compute("group_relative", [group([2, 0, 1])], scale="none")) == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_is_that_of_trl(scale: str) -> None:
    """GRPOTrainer's lines on its own nanstd; failed rewards are left out, and have no advantage."""
    rewards = torch.tensor(SCORES, dtype=torch.float64)
    expected = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    if scale == "group":
        expected = expected / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    if scale == "batch":
        expected = expected / (nanstd(rewards) + 1e-4)
    ours = first(compute("group_relative", [group(row) for row in SCORES], scale=scale))
    np.testing.assert_allclose(ours, torch.nan_to_num(expected, nan=0.0).numpy(), atol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
def test_rloo_is_that_of_trl(normalise: bool) -> None:
    rewards = torch.tensor(SCORES, dtype=torch.float64)
    counts = (~rewards.isnan()).sum(1, keepdim=True)
    expected = rewards - (torch.nansum(rewards, 1, keepdim=True) - rewards) / (counts - 1)
    if normalise:
        expected = (expected - torch.nanmean(expected)) / (nanstd(expected) + 1e-4)
    groups = [group(row) for row in SCORES]
    ours = first(compute("rloo", groups, kl_coefficient=0.0, normalise=normalise))
    np.testing.assert_allclose(ours, torch.nan_to_num(expected, nan=0.0).numpy(), atol=1e-6)


def test_rloo_takes_the_kl_of_the_whole_completion_first() -> None:
    """Scores 1 and 0, KL 0.5 + 0.5 and 2 at β = 0.1: 0.9 and −0.2."""
    one = group([1, 0], [2, 1], log_ratios=(np.array([0.5, 0.5]), np.array([2.0])))
    assert first(compute("rloo", [one], kl_coefficient=0.1))[0] == pytest.approx([1.1, -1.1])


@pytest.mark.parametrize("name", ["group_relative", "rloo"])
@given(score=st.floats(-10, 10), count=st.integers(2, 9))
def test_equal_scores_teach_exactly_nothing(name: str, score: float, count: int) -> None:
    settings = {} if name == "group_relative" else {"kl_coefficient": 0.0}
    (credits,) = compute(name, [group([score] * count)], **settings)
    assert is_idle(credits)


def test_a_group_is_idle_if_no_token_has_an_advantage() -> None:
    zero, some = np.zeros(3, np.float32), np.array([0, 1e-9, 0], np.float32)
    assert is_idle([Credit(zero), Credit(zero)])
    assert not is_idle([Credit(zero), Credit(some)])


def test_the_mean_of_rloo_is_the_score_less_its_expectation() -> None:
    """Over all partners, each as probable as the policy makes it: E[A | y] = r(y) − E[r], so the gradient is exact."""
    scores, chances = [0.3, -1.0, 2.0], [0.2, 0.5, 0.3]
    mean = sum(c * s for c, s in zip(chances, scores, strict=True))
    for score in scores:
        pairs = [first(compute("rloo", [group([score, other])], kl_coefficient=0.0))[0][0] for other in scores]
        assert sum(c * a for c, a in zip(chances, pairs, strict=True)) == pytest.approx(score - mean, abs=1e-6)


def test_reinforce_baselines_by_hand() -> None:
    """Two batches of means 1 and 4: the running baseline of the second is 1, of the third (1 + 1 + 4 + 4)/4."""
    batches = [[group([2]), group([0])], [group([5]), group([3])], [group([0]), group([NAN])]]
    none, batch, running = (
        ADVANTAGES["reinforce"].bind({"kl_coefficient": 0.0, "baseline": baseline})
        for baseline in ("none", "batch", "running")
    )
    assert [first(none(groups)) for groups in batches] == [[[2], [0]], [[5], [3]], [[0], [0]]]
    assert [first(batch(groups)) for groups in batches] == [[[1], [-1]], [[1], [-1]], [[0], [0]]]
    assert [first(running(groups)) for groups in batches] == [[[2], [0]], [[4], [2]], [[-2.5], [0]]]


def test_reinforce_plus_plus_by_hand() -> None:
    """β = 0.5. Rewards (−0.5, 0 + 2) and (−1 + 0); from here on (1.5, 2), (−1); mean 5/6, variance 31/12."""
    groups = [group([2], [2], log_ratios=(np.array([1.0, 0.0]),)), group([0], [1], log_ratios=(np.array([2.0]),))]
    credits = compute("reinforce_plus_plus", groups, kl_coefficient=0.5)
    found = np.concatenate([c.advantage_L for row in credits for c in row])
    assert found == pytest.approx([(x - 5 / 6) / math.sqrt(31 / 12) for x in (1.5, 2.0, -1.0)], rel=1e-5)


def test_reinforce_plus_plus_with_a_baseline_compares_within_the_prompt() -> None:
    """Scores 11 and 9, 1 and −1: less the prompt's mean both prompts are the same."""
    groups = [group([11, 9]), group([1, -1])]
    one, two = compute("reinforce_plus_plus", groups, kl_coefficient=0.0, baseline="group")
    assert [c.advantage_L.tolist() for c in one] == [c.advantage_L.tolist() for c in two]
    plain = compute("reinforce_plus_plus", groups, kl_coefficient=0.0)
    assert plain[0][1].advantage_L[0] > plain[1][0].advantage_L[0]


def test_a_batch_whose_rewards_all_failed_teaches_nothing() -> None:
    for name in (name for name in ADVANTAGES if ADVANTAGES[name].reads_scores):
        settings = {} if name == "group_relative" else {"kl_coefficient": 0.0}
        failed = group([NAN, NAN], [1, 2], values=(np.ones(1), np.ones(2)))
        assert all(is_idle(credits) for credits in compute(name, [failed, failed], **settings)), name


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_both_estimators_of_the_kl_are_unbiased(policy: list[float], reference: list[float]) -> None:
    """Exact expectation over a small vocabulary; k3 is never negative."""
    p, q = (np.array(values[: len(policy)]) / sum(values[: len(policy)]) for values in (policy, reference))
    kl = float((p * np.log(p / q)).sum())
    for estimator in ("k1", "k3"):
        assert float((p * kl_of(np.log(p / q), estimator)).sum()) == pytest.approx(kl, abs=1e-12)
    assert (kl_of(np.log(p / q), "k3") >= -1e-15).all()


def test_the_weight_of_the_kl_follows_its_target() -> None:
    """Twice the target is cut to +0.2: 0.1·(1 + 0.2·64/10000). Below it falls; at it, it stays."""
    assert adapted(0.1, 12.0, 64, 6.0, 10_000) == pytest.approx(0.1 * 1.00128)
    assert adapted(0.1, 5.4, 64, 6.0, 10_000) == pytest.approx(0.1 * (1 - 0.1 * 64 / 10_000))
    assert adapted(0.1, 6.0, 64, 6.0, 10_000) == 0.1


def test_a_memory_goes_through_json() -> None:
    """A batch of KL 8 + 0 over two completions, target 2: error 1, cut to 0.2, times 2/100. The next batch uses it."""
    settings = {"kl_coefficient": 0.1, "kl_target": 2.0, "kl_horizon": 100, "baseline": "running"}
    first_run, second_run = (ADVANTAGES["reinforce"].bind(settings) for _ in range(2))
    groups = [group([1, 3], [2, 1], log_ratios=(np.array([5.0, 3.0]), np.zeros(1)))]
    assert first(first_run(groups))[0] == pytest.approx([1 - 0.8, 3])
    state = json.loads(json.dumps(first_run.state()))
    assert state == pytest.approx({"kl_coefficient": 0.1 * 1.004, "score": 1.6, "count": 2})
    second_run.restore(state)
    assert first(second_run(groups)) == first(first_run(groups))
    with pytest.raises(RunError, match="no memory of an advantage"):
        second_run.restore({"mean": 1.0})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rloo", {"kl_coefficient": 0.0, "kl_target": 6.0}, "no effect while kl_coefficient is 0"),
        ("gae", {"kl_coefficient": 0.0, "kl_estimator": "k3"}, "no effect while kl_coefficient is 0"),
        ("gae", {"kl_horizon": 5}, "no effect without kl_target"),
        ("group_relative", {"kl_coefficient": 0.1}, "kl_coefficient"),
        ("reinforce", {"gamma": 0.9}, "gamma"),
    ],
)
def test_settings_without_an_effect_are_refused(name: str, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ADVANTAGES[name].bind(settings)


def test_what_an_advantage_needs() -> None:
    assert [name for name in ADVANTAGES if ADVANTAGES[name].needs_values] == ["gae"]
    assert ADVANTAGES["gae"].bind({}).needs_reference
    assert not ADVANTAGES["gae"].bind({"kl_coefficient": 0.0}).needs_reference
    assert not ADVANTAGES["group_relative"].bind({}).needs_reference
    for name in ("group_relative", "rloo"):
        with pytest.raises(ConfigError, match="two or more completions"):
            compute(name, [group([1.0])], **({} if name == "group_relative" else {"kl_coefficient": 0.0}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (1, 2, 3)}, "3 lengths for 2 scores"),
        ({"lengths": (1, 0)}, "at least one token"),
        ({"lengths": (1, 2), "truncated": (True,)}, "1 truncated for 2 scores"),
        ({"lengths": (1, 2), "values": (np.zeros(1), np.zeros(1))}, r"values of \[1, 1\] tokens"),
    ],
)
def test_a_group_that_does_not_fit_itself_is_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Group(np.zeros(2), **fields)


def test_averages_by_hand() -> None:
    """Completions of 1, 0 (left out) and 3 tokens, 8 at most."""
    assert token_weights([1, 0, 3], "token", 8) == ([1, 0, 1], 4)
    assert token_weights([1, 0, 3], "sequence", 8) == ([1, 0, pytest.approx(1 / 3)], 2)
    assert token_weights([1, 0, 3], "constant", 8) == ([1, 0, 1], 16)


@pytest.mark.parametrize("average", ["token", "sequence"])
@given(lengths=st.lists(st.integers(0, 50), min_size=1))
def test_a_denominator_is_the_sum_of_the_weights(average: Any, lengths: list[int]) -> None:
    weights, denominator = token_weights(lengths, average, 50)
    assert sum(w * length for w, length in zip(weights, lengths, strict=True)) == pytest.approx(denominator)


@given(st.integers(0, 200))
def test_the_overlong_penalty_is_dapos(length: int) -> None:
    """Eq. 13 with L_max = 100 and L_cache = 20."""
    expected = 0.0 if length <= 80 else -1.0 if length > 100 else ((100 - 20) - length) / 20
    assert overlong_penalty(length, 100, 20) == expected


@pytest.mark.parametrize("buffer", [0, 101])
def test_a_buffer_outside_the_limit_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match="1 to 100 tokens"):
        overlong_penalty(5, 100, buffer)
