"""The gradient that reaches the weights, through advantages, averages, packing and engine, is that of the objective.

The losses alone are held to enumeration in tests/losses. Here the expectation over all 4,096 strings of a language is
differentiated twice: through a plain transformers model, and as rollouts, one of each string, of the weight of its
probability.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from enumerated import LENGTH, LETTERS, PROMPT, STRINGS, Student, World, in_trees
from torch import Tensor

from accord.advantages import Group, Memory, ReverseKLConfig, RLOOConfig, reverse_kl, rloo
from accord.losses import LOSSES


@pytest.fixture(scope="module")
def objective(world: World) -> dict[str, Tensor]:
    """∇ of E[r] − β·KL(π ‖ π_ref) at weights a little away from the reference, by autograd over all strings."""
    model = world.plain(moved(world).policy)
    logp_S = world.log_probabilities(model)
    value_S = torch.from_numpy(world.reward_S) - world.beta * (logp_S - torch.from_numpy(world.reference_S))
    (logp_S.exp() * value_S).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def moved(world: World, loss: str = "reinforce", settings: dict[str, Any] | None = None) -> Student:
    """A policy that is not the reference any more: the KL has a gradient."""
    student = Student(world, LOSSES[loss].bind(settings or {}), steps=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.policy.model.named_parameters():
            if "value_head" not in name:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return student


@pytest.mark.parametrize(
    ("loss", "settings", "kl_in_loss"),
    [
        ("reinforce", {}, False),
        ("cispo", {}, False),
        ("ppo_clip", {}, False),
        ("ppo_clip", {"ratio_level": "sequence_sum"}, False),
        ("ppo_clip", {"ratio_level": "sequence_sum", "kl_estimator": "k3"}, True),
        ("ppo_clip", {"ratio_level": "sequence_sum", "kl_estimator": "k1"}, True),
    ],
)
def test_the_engines_gradient_is_that_of_the_objective(
    loss: str, settings: dict[str, Any], kl_in_loss: bool, world: World, objective: dict[str, Tensor]
) -> None:
    """A string's advantage is its reward, or that less β times its whole log-ratio; its letters share its weight where
    each of them has the gradient of the whole string."""
    share = LENGTH if settings.get("ratio_level") else 1
    if kl_in_loss:
        settings = {**settings, "kl_coefficient": LENGTH * world.beta}
        assert share == LENGTH
    student = moved(world, loss, settings)
    logp_SL = world.letters(student.policy)
    earned_S = world.reward_S
    if not kl_in_loss:
        earned_S = earned_S - world.beta * (logp_SL - world.reference_SL).sum(1)
    branches = [
        replace(
            world.branch(string),
            behaviour_L=logp_SL[string].astype(np.float32),
            advantage_L=np.full(LENGTH, earned_S[string], np.float32),
            weight_L=np.full(LENGTH, np.exp(logp_SL[string].sum()) / share, np.float32),
        )
        for string in range(len(STRINGS))
    ]
    student.engine.forward_backward(in_trees(branches), student.loss, denominator=1.0)
    found = {n: p.grad for n, p in student.policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == objective.keys()
    largest = max(float(gradient.norm()) for gradient in objective.values())
    for name, expected in objective.items():
        assert float((found[name] + expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-5 * largest, name


def test_distillation_has_the_gradient_of_the_reverse_kl(world: World) -> None:
    """∇ of Σ KL(π ‖ π_T) over all states, each as likely as the policy comes to it, which has no gradient.

    The teacher is the world's reference. By autograd through whole next-letter distributions.
    """
    states = list(itertools.product(range(LETTERS), repeat=LENGTH - 1))
    prefixes = torch.tensor([[*PROMPT, *state] for state in states])
    with torch.no_grad():
        teacher = world.plain(world.policy())(prefixes).logits.double().log_softmax(-1)
    student = moved(world, "ppo_clip")
    logp_SL = world.letters(student.policy)
    model = world.plain(student.policy)
    said = model(prefixes).logits.double().log_softmax(-1)
    spoken = said[:, :-1].gather(2, torch.tensor(states)[..., None])[..., 0].detach()
    reached = torch.cat([torch.zeros(len(states), 1), spoken.cumsum(1)], 1)
    alike = torch.tensor([float(LETTERS) ** (LENGTH - 1 - place) for place in range(LENGTH)])  # rows of the same state
    ((reached.exp() / alike) * (said.exp() * (said - teacher)).sum(-1)).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    ratios = tuple(logp_SL - world.reference_SL)
    group = Group(np.zeros(len(STRINGS)), (LENGTH,) * len(STRINGS), log_ratios=ratios)
    (credits,) = reverse_kl([group], ReverseKLConfig(teacher="reference"), Memory())
    branches = [
        replace(
            world.branch(string),
            behaviour_L=logp_SL[string].astype(np.float32),
            advantage_L=credit.advantage_L,
            weight_L=np.full(LENGTH, np.exp(logp_SL[string].sum()), np.float32),
        )
        for string, credit in enumerate(credits)
    ]
    student.engine.forward_backward(in_trees(branches), student.loss, denominator=1.0)
    found = {n: p.grad for n, p in student.policy.model.named_parameters() if p.grad is not None}
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-5 * largest, name


def test_leave_one_out_is_unbiased(world: World) -> None:
    """All pairs of two samples from 64 strings, each of its probability: E[A·∇log π] is E[r·∇log π], in the table of
    the strings' logits, where ∇log π of string i is e_i − π."""
    reward, chance = world.reward_S[:64], np.exp(world.reference_S[:64])
    chance = chance / chance.sum()
    found = np.zeros(64)
    for first in range(64):
        for second in range(64):
            ((one, two),) = rloo([Group(reward[[first, second]], (1, 1))], RLOOConfig(kl_coefficient=0.0), Memory())
            for string, credit in ((first, one), (second, two)):
                score = -chance
                score = score + np.eye(64)[string]
                found += chance[first] * chance[second] * 0.5 * float(credit.advantage_L[0]) * score
    np.testing.assert_allclose(found, chance * (reward - chance @ reward), atol=1e-6)
