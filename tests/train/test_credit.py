"""From rollouts to updates: scores, pairs, the best, shares of a step; numbers by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.advantages import ADVANTAGES
from accord.models.trees import Tree, with_reference
from accord.train.credit import (
    best_trees,
    groups_of,
    kl_metrics,
    pair_trees,
    policy_trees,
    rollout_metrics,
    scores_of,
    trees_of,
    weighted_updates,
    whole_updates,
)
from accord.train.online_config import RolloutConfig
from accord.train.rollouts import EncodedPrompt, Rollout
from accord.types import Completion, Prompt, Reward


def rollout(values: Sequence[float | None], lengths: Sequence[int], stops: str = "") -> Rollout:
    """Completions of these lengths and rewards; `stops` has an l where the token limit ended one."""
    completions = tuple(
        Completion(
            prompt_id="p",
            text="",
            token_ids=tuple(range(10 * k, 10 * k + length)),
            logprobs=(-0.5,) * length,
            raw_logprobs=(-0.5,) * length,
            stop_reason="length" if stops[k : k + 1] == "l" else "stop",
            temperature=1.0,
            seed=k,
            policy_version=3,
        )
        for k, length in enumerate(lengths)
    )
    failed = {"r": "why"}
    rewards = tuple(Reward(value, {"r": value}, {} if value is not None else failed) for value in values)
    return Rollout(EncodedPrompt(Prompt("p", "x"), np.array([1, 2])), completions, rewards)


def lengths_of(tree: Tree) -> list[int]:
    return [len(branch.tokens_L) for branch in tree.branches]


def test_scores_are_rewards_less_penalties() -> None:
    """Of 10 tokens the last 4 are the buffer: 8 tokens cost 0.5, 10 cost 1; the limit ended the last one: 0.25 more."""
    config = RolloutConfig(overlong_buffer=0.4, eos_penalty=0.25)
    scores_K = scores_of(rollout([1.0, 1.0, None, 0.0], [6, 8, 3, 10], "---l"), config, 10)
    np.testing.assert_allclose(scores_K, [1.0, 0.5, np.nan, -1.25])


def test_pairs_are_best_and_worst() -> None:
    rollouts = [
        rollout([0.2, 0.9, 0.1], [1, 2, 3]),
        rollout([0.5, 0.5, 0.5], [1, 2, 3]),
        rollout([None, 0.3, 0.3], [1, 2, 3]),
        rollout([1.0, None, 0.0], [4, 5, 6]),
    ]
    scores = [scores_of(each, RolloutConfig(), 10) for each in rollouts]
    pairs = pair_trees(trees_of(rollouts), scores)
    assert [lengths_of(tree) for tree in pairs] == [[2, 3], [4, 6]]
    assert [tree.pairs for tree in pairs] == [((0, 1),), ((0, 1),)]


def test_the_best_is_imitated_if_it_is_good_enough() -> None:
    rollouts = [rollout([0.2, 0.9], [1, 2]), rollout([0.1, 0.0], [3, 4]), rollout([None, None], [5, 6])]
    scores = [scores_of(each, RolloutConfig(), 10) for each in rollouts]
    assert [lengths_of(tree) for tree in best_trees(trees_of(rollouts), scores, None)] == [[2], [3]]
    assert [lengths_of(tree) for tree in best_trees(trees_of(rollouts), scores, 0.5)] == [[2]]


def test_a_failed_reward_takes_its_completion_out_of_everything() -> None:
    """The other two are compared with each other alone: ±1/√2 of a std of 1/√2 (and 1e-4)."""
    config = RolloutConfig(average="sequence")
    rollouts = [rollout([1.0, None, 0.0], [2, 5, 4]), rollout([None, None, None], [1, 1, 1])]
    scores = [scores_of(each, config, 10) for each in rollouts]
    trees = trees_of(rollouts)
    advantage = ADVANTAGES["group_relative"].bind({})
    found, idle = policy_trees(trees, groups_of(trees, scores, None), advantage, config, 10)
    assert [lengths_of(tree) for tree in found] == [[2, 4]]
    assert idle == [False]
    good, bad = found[0].branches
    expected = 0.5 / (np.sqrt(0.5) + 1e-4)
    assert good.advantage_L is not None
    assert bad.advantage_L is not None
    np.testing.assert_allclose(good.advantage_L, [expected] * 2, rtol=1e-6)
    np.testing.assert_allclose(bad.advantage_L, [-expected] * 4, rtol=1e-6)
    assert good.weight_L is not None
    np.testing.assert_allclose(good.weight_L, [0.5, 0.5])


@pytest.mark.parametrize(
    ("average", "denominator"), [("token", 4 + 6.0), ("sequence", 2 + 2.0), ("constant", 4 * 10.0)]
)
def test_idle_groups_keep_their_share(average: str, denominator: float) -> None:
    config = RolloutConfig.build({"average": average})
    trees = trees_of([rollout([1.0, 0.0], [1, 3]), rollout([1.0, 1.0], [2, 4])])
    (update,) = weighted_updates(trees, [False, True], config, 10, (0, 0))
    assert update.denominator == denominator
    assert list(update.trees) == trees[:1]
    assert weighted_updates(trees, [True, True], config, 10, (0, 0)) == []


@given(count=st.integers(1, 9), epochs=st.integers(1, 3), mini_batches=st.integers(1, 5), seed=st.integers(0, 1 << 30))
def test_every_epoch_takes_every_tree_once(count: int, epochs: int, mini_batches: int, seed: int) -> None:
    """The denominators of an epoch's mini-batches are those of what is in them, so they add up to the whole."""
    config = RolloutConfig(epochs=epochs, mini_batches=mini_batches, average="token")
    trees = trees_of([rollout([1.0, 0.0], [1 + place, 2]) for place in range(count)])
    updates = weighted_updates(trees, [False] * count, config, 10, (seed, 1))
    parts = min(mini_batches, count)
    assert len(updates) == epochs * parts
    for epoch in range(epochs):
        mine = updates[epoch * parts : (epoch + 1) * parts]
        assert sorted(id(tree) for update in mine for tree in update.trees) == sorted(map(id, trees))
        for update in mine:
            assert update.denominator == sum(sum(lengths_of(tree)) for tree in update.trees)
    assert [[id(t) for t in u.trees] for u in weighted_updates(trees, [False] * count, config, 10, (seed, 1))] == [
        [id(t) for t in u.trees] for u in updates
    ]
    assert len(whole_updates(trees, config, (seed, 1))) == len(updates)


def test_metrics_of_a_step() -> None:
    """Stds with n − 1 of the groups are √½ and 0; one of four was cut; tokens 1, 3, 2, 4; sampled two versions ago."""
    rollouts = [rollout([1.0, 0.0], [1, 3], "-l"), rollout([1.0, 1.0], [2, 4])]
    metrics = rollout_metrics(rollouts, 5)
    assert metrics["reward"] == 0.75
    assert metrics["reward_std"] == pytest.approx(np.sqrt(0.5) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["completions/clipped_ratio"] == 0.25
    assert [metrics[f"completions/{name}_length"] for name in ("mean", "min", "max")] == [2.5, 1, 4]
    assert metrics["completions/mean_terminated_length"] == pytest.approx(7 / 3)
    assert metrics["sampling/version_lag"] == 2
    single = rollout_metrics([rollout([1.0], [1]), rollout([0.0], [1])], 3)
    assert single["reward_std"] == pytest.approx(np.sqrt(0.5))
    assert "frac_reward_zero_std" not in single


def test_the_kl_is_of_whole_completions() -> None:
    tree = trees_of([rollout([1.0, 0.0], [1, 3])])[0]
    referred = with_reference(tree, [np.array([-0.7], np.float32), np.array([-0.5, -0.6, -0.8], np.float32)])
    metrics = kl_metrics(groups_of([referred], [np.array([1.0, 0.0])], None), 0.1)
    assert metrics["objective/kl"] == pytest.approx((0.2 + 0.4) / 2)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.03)
