"""In a language that can be enumerated, every method ends at the policy that theory says is best.

The policy is a transformer of 18,000 weights; it is sampled, scored and trained as any other. What is asserted is
exact: sums over all strings, not estimates. Bounds are on the total variation to π*, 0.37 at the start. What is left is
the noise of few samples: benchmarks/evidence/exact_world.py goes on to 0.02.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from enumerated import (
    LENGTH,
    LETTERS,
    STRINGS,
    Point,
    Student,
    World,
    distance,
    methods,
    online,
    preferences,
    rankings,
)
from scipy.special import logsumexp
from scipy.stats import chisquare

from accord.advantages import ADVANTAGES, Group
from accord.losses import LOSSES

ROUNDING = 1e-9


def assert_never_above_the_frontier(points: list[Point]) -> None:
    assert all(point.reward <= point.most + ROUNDING for point in points)


def test_the_best_policy_is_the_best(world: World) -> None:
    """Its reward less β·KL is β·log E_ref exp(r/β) (Rafailov et al. 2023, eq. 14), and it lies on the frontier."""
    best = world.point_of(world.optimum_S)
    assert best.distance == 0
    assert best.reward - world.beta * best.kl == pytest.approx(
        world.beta * logsumexp(world.reference_S + world.reward_S / world.beta)
    )
    assert best.reward == pytest.approx(best.most)
    assert world.point(world.policy(), 0).distance > 0.3


def test_no_policy_is_above_the_frontier_and_tilted_ones_are_on_it(world: World) -> None:
    random = np.random.default_rng(0)
    for temperature in np.geomspace(0.3, 100, 7):
        tilted_S = world.tilted(temperature)
        on = world.point_of(tilted_S)
        assert on.reward == pytest.approx(on.most)
        scores_S = tilted_S + random.normal(size=len(STRINGS))
        off = world.point_of(scores_S - logsumexp(scores_S))
        assert off.reward < off.most


def test_what_is_sampled_has_the_probabilities_of_the_plain_model(world: World) -> None:
    """χ² of the 64 first pairs of letters among 4,096 samples, and the log-probability of every letter."""
    student = Student(world, LOSSES["ppo_clip"].bind({}), steps=1)
    completions = student.sample(4096, seed=3)
    strings = np.array([completion.token_ids for completion in completions])
    number_K = strings @ LETTERS ** np.arange(LENGTH - 1, -1, -1)
    expected = np.exp(world.reference_S).reshape(64, 64).sum(1)
    counts = np.bincount(number_K // 64, minlength=64)
    assert chisquare(counts, len(strings) * expected / expected.sum()).pvalue > 1e-3
    said = np.array([completion.logprobs for completion in completions])
    np.testing.assert_allclose(said, world.reference_SL[number_K], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "steps", "samples", "bound"),
    [("rloo", 90, 1024, 0.025), ("ppo", 60, 768, 0.1), ("grpo", 60, 1024, 0.11)],
)
def test_online_methods_come_to_the_best_policy(
    name: str, steps: int, samples: int, bound: float, world: World
) -> None:
    points = online(world, methods(world.beta)[name], steps=steps, samples=samples)
    assert points[-1].distance <= bound
    assert_never_above_the_frontier(points)


def test_a_kl_of_single_letters_leads_elsewhere(world: World) -> None:
    """GRPO as it is mostly written weighs the KL of each token by that token's ratio: its fixed point is not π*."""
    elsewhere = world.point_of(world.letterwise())
    assert logsumexp(world.letterwise()) == pytest.approx(0, abs=1e-9)
    assert elsewhere.distance > 0.03
    assert elsewhere.reward < elsewhere.most - 1e-4


@pytest.mark.parametrize("scale", ["none", "group"])
def test_dividing_by_the_standard_deviation_leads_to_another_beta(scale: str, world: World) -> None:
    """At its fixed point the advantage of every string is β times its log-ratio but for a constant, which has no
    gradient: at π* if scores are not divided, at `World.rescaled` if they are."""
    home_S = {"none": world.optimum_S, "group": world.rescaled()}[scale]
    string_K = np.repeat(np.arange(len(STRINGS)), np.rint(50_000 * np.exp(home_S)).astype(int))
    group = Group(world.reward_S[string_K], (LENGTH,) * len(string_K))
    (credits,) = ADVANTAGES["group_relative"].bind({"scale": scale})([group])
    advantage_K = np.array([credit.advantage_L[0] for credit in credits])
    left_K = advantage_K - world.beta * (home_S - world.reference_S)[string_K]
    assert left_K.std() <= 0.01 * advantage_K.std()
    assert distance(world.rescaled(), world.optimum_S) > 0.1


def test_dpo_comes_nearer_with_more_pairs(world: World) -> None:
    """Rankings of 63 strings are 1,953 pairs each. Few pairs are learned by heart; many give the best policy."""
    ends = []
    for count in (2, 16, 1280):
        points = preferences(world, rankings(world, count), steps=40, every=20)
        assert_never_above_the_frontier(points)
        ends.append(points[-1].distance)
    assert ends[0] > ends[1] > ends[2]
    assert ends[2] <= 0.1


@pytest.mark.parametrize("start", [0.5, 8.0])
def test_the_adaptive_kl_reaches_its_target(start: float, world: World) -> None:
    """From a weight that is too small by far, and from one too large: the exact KL ends within a fifth of 0.25 nats."""
    name, settings = methods(start)["ppo"].advantage
    advantage = (name, {**settings, "kl_target": 0.25, "kl_horizon": 1024})
    points = online(world, replace(methods(start)["ppo"], advantage=advantage), steps=70, samples=384, every=5)
    assert points[-1].kl == pytest.approx(0.25, rel=0.2)
    assert np.mean([point.kl for point in points[-4:]]) == pytest.approx(0.25, rel=0.2)
    assert_never_above_the_frontier(points)
