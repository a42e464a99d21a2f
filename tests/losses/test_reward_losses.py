"""Soft labels and regression against numbers derived by hand, their slopes, and torch's own losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accord.losses import (
    BradleyTerryConfig,
    PairScores,
    RatingScores,
    RegressionConfig,
    bradley_terry,
    regression,
)

numbers = st.floats(-30, 30, width=32)


def pair(chosen: Tensor, rejected: float, margin: float, probability: float) -> PairScores:
    rest = [torch.full_like(chosen, value) for value in (rejected, margin, probability)]
    return PairScores(chosen, *rest, torch.ones_like(chosen))


def loss(chosen: float, rejected: float, margin: float = 0.0, probability: float = 1.0) -> float:
    inputs = pair(torch.tensor([chosen], dtype=torch.float64), rejected, margin, probability)
    return float(bradley_terry(inputs, BradleyTerryConfig()).loss)


def test_soft_labels_by_hand() -> None:
    """σ(ln 3) = ¾; with three of four votes −¾·ln ¾ − ¼·ln ¼, the entropy: no scores do better."""
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert loss(math.log(3), 0, probability=0.75) == pytest.approx(entropy)
    assert loss(math.log(3) + 0.5, 0.5, margin=0.0, probability=0.75) == pytest.approx(entropy)
    assert loss(math.log(3) + 0.3, 0, probability=0.75) > entropy
    assert loss(math.log(3) - 0.3, 0, probability=0.75) > entropy


@given(numbers, numbers, st.floats(-3, 3), st.floats(0, 1))
def test_soft_labels_are_torchs_cross_entropy(
    chosen: float, rejected: float, margin: float, probability: float
) -> None:
    logits, target = (torch.tensor([value], dtype=torch.float64) for value in (chosen - rejected - margin, probability))
    expected = float(torch.nn.functional.binary_cross_entropy_with_logits(logits, target))
    assert loss(chosen, rejected, margin, probability) == pytest.approx(expected, abs=1e-9)


@given(numbers, numbers, st.floats(0, 1))
def test_to_swap_a_pair_and_its_probability_changes_nothing(one: float, other: float, probability: float) -> None:
    assert loss(one, other, probability=probability) == pytest.approx(
        loss(other, one, probability=1 - probability), abs=1e-9
    )


def test_the_slope_of_a_soft_label(slope: Any) -> None:
    """∂L/∂chosen = σ(Δ) − q: at Δ = ln 3 and q = ½ a quarter, at q = ¾ nothing."""
    for probability, expected in [(0.5, 0.25), (0.75, 0.0), (1.0, -0.25)]:
        found = slope(lambda x, q=probability: bradley_terry(pair(x, 0, 0, q), BradleyTerryConfig()), math.log(3))
        assert found == pytest.approx(expected, abs=1e-9)


def test_regression_by_hand(slope: Any) -> None:
    """Errors 0.5 and −2: squares 0.25 and 4; the slope is twice the error."""
    output = regression(
        RatingScores(torch.tensor([1.5, -1.0]), torch.tensor([1.0, 1.0]), torch.ones(2)), RegressionConfig()
    )
    assert output.loss.tolist() == [0.25, 4.0]
    assert output.metrics["absolute_error"].tolist() == [0.5, 2.0]
    target = torch.tensor([1.0], dtype=torch.float64)
    found = slope(lambda x: regression(RatingScores(x, target, torch.ones_like(x)), RegressionConfig()), 1.5)
    assert found == pytest.approx(1.0)
