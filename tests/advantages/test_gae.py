"""GAE and the details of PPO: against a double loop, and each detail by its own golden number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.advantages import ADVANTAGES, Credit, Group
from accord.advantages.gae import gae_of

numbers = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=12)

PLAIN = {"kl_coefficient": 0.0, "whiten_advantages": False}
"""None of the details."""
DETAILS: dict[str, Any] = {
    "kl_coefficient": 0.1,
    "kl_estimator": "k3",
    "gamma": 0.9,
    "lam": 0.8,
    "missing_eos_penalty": 0.5,
    "whiten_rewards": True,
    "whiten_advantages": True,
}


def batch() -> list[Group]:
    """One completion of 2 tokens that ended by itself, one of 1 token that the limit ended."""
    return [
        Group(
            np.array([1.0, 2.0]),
            (2, 1),
            truncated=(False, True),
            log_ratios=(np.array([0.4, -0.2]), np.array([1.0])),
            values=(np.array([0.5, 0.25]), np.array([0.75])),
        )
    ]


def compute(**settings: Any) -> list[Credit]:
    (credits,) = ADVANTAGES["gae"].bind(settings)(batch())
    return credits


def advantages(**settings: Any) -> list[float]:
    return np.concatenate([credit.advantage_L for credit in compute(**settings)]).tolist()


@given(numbers, st.floats(0.1, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(steps: list[tuple[float, float]], gamma: float, lam: float) -> None:
    """A_t = Σ_l (γλ)^l·δ_{t+l} (Schulman et al. 2016, eq. 16)."""
    rewards, values = (np.array(column) for column in zip(*steps, strict=True))
    count, after = len(steps), [*values[1:], 0.0]
    expected = [
        sum((gamma * lam) ** (s - t) * (rewards[s] + gamma * after[s] - values[s]) for s in range(t, count))
        for t in range(count)
    ]
    np.testing.assert_allclose(gae_of(rewards, values, gamma, lam), expected, atol=1e-9)


@given(numbers, st.floats(0.1, 1))
def test_at_lambda_1_and_0_it_is_the_return_and_one_step(steps: list[tuple[float, float]], gamma: float) -> None:
    rewards, values = (np.array(column) for column in zip(*steps, strict=True))
    to_go = [sum(gamma ** (s - t) * rewards[s] for s in range(t, len(steps))) for t in range(len(steps))]
    np.testing.assert_allclose(gae_of(rewards, values, gamma, 1.0), np.array(to_go) - values, atol=1e-9)
    one_step = rewards + gamma * np.append(values[1:], 0) - values
    np.testing.assert_allclose(gae_of(rewards, values, gamma, 0.0), one_step, atol=1e-9)


def test_without_details_by_hand() -> None:
    """γ = 1, λ = 0.95: δ = (0 + 0.25 − 0.5, 1 − 0.25) and (2 − 0.75); A₁ = −0.25 + 0.95·0.75. Returns are A + V."""
    credits = compute(**PLAIN)
    assert np.concatenate([c.advantage_L for c in credits]) == pytest.approx([0.4625, 0.75, 1.25])
    assert np.concatenate([c.return_L for c in credits]) == pytest.approx([0.9625, 1.0, 2.0])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        # Rewards (−0.04, 1 + 0.02), (2 − 0.1): δ = (−0.29, 0.77), (1.15); A₁ = −0.29 + 0.95·0.77.
        ({"kl_coefficient": 0.1}, [0.4415, 0.77, 1.15]),
        # k3 of 0.4, −0.2, 1 is e^−0.4 − 0.6, e^0.2 − 1.2, e^−1.
        (
            {"kl_coefficient": 0.1, "kl_estimator": "k3"},
            [
                -0.25 - 0.1 * (math.exp(-0.4) - 0.6) + 0.95 * (0.75 - 0.1 * (math.exp(0.2) - 1.2)),
                0.75 - 0.1 * (math.exp(0.2) - 1.2),
                1.25 - 0.1 * math.exp(-1),
            ],
        ),
        # δ₁ = 0.9·0.25 − 0.5, A₁ = −0.275 + 0.9·0.95·0.75.
        ({"gamma": 0.9}, [0.36625, 0.75, 1.25]),
        ({"lam": 0.5}, [0.125, 0.75, 1.25]),
        # The second completion was ended by the limit: 2 − 0.5.
        ({"missing_eos_penalty": 0.5}, [0.4625, 0.75, 0.75]),
        # Rewards 0, 1, 2: mean 1, variance 1, so with their mean kept they stay.
        ({"whiten_rewards": True}, [0.4625, 0.75, 1.25]),
        # Rewards 0, 1, 1.5: mean 5/6, variance 7/12.
        (
            {"whiten_rewards": True, "missing_eos_penalty": 0.5},
            [
                (white := lambda x: (x - 5 / 6) / math.sqrt(7 / 12) + 5 / 6)(0) - 0.25 + 0.95 * (white(1) - 0.25),
                white(1) - 0.25,
                white(1.5) - 0.75,
            ],
        ),
    ],
)
def test_each_detail_by_hand(setting: dict[str, Any], expected: list[float]) -> None:
    assert advantages(**{**PLAIN, **setting}) == pytest.approx(expected, rel=1e-5)


def test_whitened_advantages_by_hand_and_returns_from_before() -> None:
    """0.4625, 0.75, 1.25 have mean 0.820833 and variance 0.158802 with n − 1."""
    credits = compute(kl_coefficient=0.0)
    expected = [(x - 0.8208333) / math.sqrt(0.1588021 + 1e-8) for x in (0.4625, 0.75, 1.25)]
    assert np.concatenate([c.advantage_L for c in credits]) == pytest.approx(expected, rel=1e-4)
    assert np.concatenate([c.return_L for c in credits]) == pytest.approx([0.9625, 1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("kl_coefficient", 0.05),
        ("kl_estimator", "k1"),
        ("gamma", 1.0),
        ("lam", 0.95),
        ("missing_eos_penalty", 0.0),
        ("whiten_rewards", False),
        ("whiten_advantages", False),
    ],
)
def test_taking_a_detail_away_changes_the_numbers(name: str, without: Any) -> None:
    changed = np.abs(np.array(advantages(**DETAILS)) - advantages(**{**DETAILS, name: without}))
    assert changed.max() > 1e-3


def test_a_failed_reward_touches_no_other_completion() -> None:
    """Its advantage is zero and its returns are its values; the others are whitened as if alone."""
    alone = Group(np.array([1.0]), (2,), values=(np.array([0.5, 0.25]),))
    both = Group(np.array([1.0, np.nan]), (2, 1), values=(*alone.values, np.array([0.75])))
    bound = ADVANTAGES["gae"].bind({"kl_coefficient": 0.0, "whiten_rewards": True})
    ((expected,),), ((kept, failed),) = bound([alone]), bound([both])
    np.testing.assert_array_equal(kept.advantage_L, expected.advantage_L)
    np.testing.assert_array_equal(kept.return_L, expected.return_L)
    assert failed.advantage_L.tolist() == [0.0]
    assert failed.return_L is not None
    assert failed.return_L.tolist() == [0.75]
