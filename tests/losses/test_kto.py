"""Losses of labelled completions against numbers derived by hand, their limits, signs, slopes, and order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accord.errors import ConfigError
from accord.losses import (
    LOSSES,
    ControlledLogprobs,
    LabelConfig,
    LabelledLogprobs,
    LossOutput,
    apo_zero_unpaired,
    bco,
    kto,
)
from accord.losses.labels import margin

ALL = [kto, apo_zero_unpaired, bco]
ratios = st.floats(-20, 20, width=32)
HALF = LabelConfig(beta=0.5, desirable_weight=2, undesirable_weight=3)


def rows(policy: Sequence[float], labels: Sequence[bool], control: float = 0.0) -> ControlledLogprobs:
    """Reference −10 in every row, so the log-ratio is policy + 10."""
    policy_B = torch.tensor(policy, dtype=torch.float64)
    shape = torch.ones_like(policy_B)
    return ControlledLogprobs(policy_B, -10 * shape, torch.tensor(labels), shape, torch.tensor(control).double())


def slopes(function: Callable[[Tensor], LossOutput], values: Sequence[float]) -> list[float]:
    """∂(sum of losses)/∂values by autograd."""
    leaf = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(leaf).loss.sum(), leaf)
    return [float(value) for value in gradient]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_kto_by_hand() -> None:
    """Log-ratios 2 (good) and 2 (bad), KL estimate 1, β = ½: β(2 − 1) = ½ in both.

    Good, weight 2: 2·(1 − σ(½)) = 2·0.377541 = 0.755081. Bad, weight 3: 3·(1 − σ(−½)) = 3·0.622459 = 1.867378.
    """
    output = kto(rows([-8, -8], [True, False], control=1.0), HALF)
    assert output.loss.tolist() == pytest.approx([0.755081, 1.867378], abs=1e-6)
    assert output.metrics["kl"].tolist() == [1.0, 1.0]


def test_a_negative_estimate_of_the_kl_counts_as_zero() -> None:
    """A KL is never negative, its estimate may be: 2·(1 − σ(β·2)) = 2·0.268941 = 0.537883."""
    output = kto(rows([-8], [True], control=-5.0), HALF)
    assert output.loss.tolist() == pytest.approx([0.537883], abs=1e-6)
    assert output.metrics["kl"].tolist() == [0.0]


def test_apo_zero_unpaired_by_hand() -> None:
    """Log-ratio 2, β = ½: good 2·(1 − σ(1)) = 0.537883; bad 3·σ(1) = 2.193176."""
    output = apo_zero_unpaired(rows([-8, -8], [True, False]), HALF)
    assert output.loss.tolist() == pytest.approx([0.537883, 2.193176], abs=1e-6)


def test_bco_by_hand() -> None:
    """β = ½, log-ratios 2 and 6 (good) and −2 (bad): r = 1, 3, −1; δ = ½(2 + (−1)) = ½, whatever the counts.

    Good, weight 2: −2·log σ(½) = 0.948154 and −2·log σ(5/2) = 0.157780. Bad, weight 3: −3·log σ(3/2) = 0.604240.
    """
    output = bco(rows([-8, -4, -12], [True, True, False]), HALF)
    assert output.loss.tolist() == pytest.approx([0.948154, 0.157780, 0.604240], abs=1e-6)
    assert output.metrics["delta"].tolist() == [0.5] * 3


def test_bco_with_one_label_shifts_by_its_mean() -> None:
    """r = 1 and 3: δ = 2, so −2·log σ(−1) and −2·log σ(1); all bad: δ = −1 and −3·log σ(0) = 2.079442."""
    assert bco(rows([-8, -4], [True, True]), HALF).loss.tolist() == pytest.approx([2.626523, 0.626523], abs=1e-6)
    assert bco(rows([-12], [False]), HALF).loss.tolist() == pytest.approx([2.079442], abs=1e-6)


@pytest.mark.parametrize("function", ALL)
def test_metrics_keep_the_labels_apart(function: Any) -> None:
    """Rewards are β·log-ratio; a row of the other label says nothing (NaN)."""
    metrics = function(rows([-8, -12], [True, False]), HALF).metrics
    expected = {
        "rewards/chosen": [1.0, math.nan],
        "rewards/rejected": [math.nan, -1.0],
        "logps/chosen": [-8.0, math.nan],
        "logps/rejected": [math.nan, -12.0],
    }
    for name, values in expected.items():
        assert metrics[name].tolist() == pytest.approx(values, nan_ok=True)
    assert metrics.keys() - expected.keys() == {kto: {"kl"}, bco: {"delta"}}.get(function, set())


def test_the_margin_needs_both_labels() -> None:
    assert margin({"rewards/chosen": 0.75, "rewards/rejected": -0.5, "loss": 1}) == {"rewards/margins": 1.25}
    assert margin({"rewards/chosen": 0.75}) == margin({"rewards/rejected": 0.75}) == {}


@pytest.mark.parametrize(("function", "start"), [(kto, 0.5), (apo_zero_unpaired, 0.5), (bco, math.log(2))])
def test_where_policy_is_reference_every_row_costs_the_same(function: Any, start: float) -> None:
    """Ratios and KL are 0: KTO and APO 1 − σ(0) = ½, BCO −log σ(0) = log 2, for either label and any β."""
    for beta in (0.01, 5.0):
        output = function(rows([-10, -10, -10], [True, False, True]), LabelConfig(beta=beta))
        assert output.loss.tolist() == pytest.approx([start] * 3)


def test_kto_slopes() -> None:
    """∂/∂ℓ of λ(1 − σ(±x)), x = β(ratio − z): ∓λβσ(x)σ(−x); at x = ½, β = ½: 2·½·0.235004 and 3·½·0.235004.

    The KL is a constant: its gradient is none at all.
    """

    def loss(policy: Tensor) -> LossOutput:
        whole = rows([0, 0], [True, False], control=1.0)
        return kto(ControlledLogprobs(policy, whole.ref_B, whole.good_B, whole.weight_B, whole.control), HALF)

    assert slopes(loss, [-8, -8]) == pytest.approx([-0.235004, 0.352506], abs=1e-6)

    control = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    whole = rows([-8], [True])
    policy = whole.policy_B.clone().requires_grad_()
    output = kto(ControlledLogprobs(policy, whole.ref_B, whole.good_B, whole.weight_B, control), HALF)
    output.loss.sum().backward()
    assert policy.grad is not None
    assert control.grad is None


@given(st.lists(st.tuples(ratios, st.booleans()), min_size=1, max_size=6), ratios, st.floats(0.01, 1))
def test_good_completions_are_pushed_up_and_bad_ones_down(
    drawn: list[tuple[float, bool]], control: float, beta: float
) -> None:
    """Each row's slope has its label's sign, and is what the formula says in double precision (δ held constant)."""
    values, labels = [ratio - 10 for ratio, _ in drawn], [label for _, label in drawn]
    config = LabelConfig(beta=beta, desirable_weight=1.5, undesirable_weight=0.5)
    kl = max(0.0, control)
    rewards = [beta * ratio for ratio, _ in drawn]
    sides = [[r for r, label in zip(rewards, labels, strict=True) if label == side] for side in (True, False)]
    means = [sum(side) / len(side) for side in sides if side]
    delta = sum(means) / len(means)
    for function in ALL:
        base = rows(values, labels, control)
        got = slopes(
            lambda x, f=function, b=base: f(ControlledLogprobs(x, b.ref_B, b.good_B, b.weight_B, b.control), config),
            values,
        )
        for slope, (ratio, label), reward in zip(got, drawn, rewards, strict=True):
            sign, weight = (1, 1.5) if label else (-1, 0.5)
            x = reward - delta if function is bco else beta * (ratio - (kl if function is kto else 0))
            size = sigmoid(-sign * x) if function is bco else sigmoid(x) * sigmoid(-x)
            assert slope == pytest.approx(-sign * weight * beta * size, rel=1e-6, abs=1e-12)
            assert slope * sign <= 0


@given(st.lists(st.tuples(ratios, st.booleans()), min_size=2, max_size=6), st.randoms())
def test_the_order_of_a_batch_changes_no_row(drawn: list[tuple[float, bool]], random: Any) -> None:
    order = list(range(len(drawn)))
    random.shuffle(order)
    values, labels = [ratio - 10 for ratio, _ in drawn], [label for _, label in drawn]
    for function in ALL:
        one = function(rows(values, labels, 0.5), LabelConfig())
        other = function(rows([values[i] for i in order], [labels[i] for i in order], 0.5), LabelConfig())
        torch.testing.assert_close(one.loss[order], other.loss)
        for name, metric in one.metrics.items():
            torch.testing.assert_close(metric[order], other.metrics[name], equal_nan=True)


@pytest.mark.parametrize("function", [kto, apo_zero_unpaired])
def test_limits(function: Any) -> None:
    """The value is bounded: a completion far on the right side costs 0, on the wrong side its weight, no more."""
    output = function(rows([1e4, -1e4, 1e4, -1e4], [True, True, False, False]), HALF)
    assert output.loss.tolist() == pytest.approx([0, 2, 3, 0])


def test_bco_grows_linearly_on_the_wrong_side() -> None:
    """β = ½, ratios −10⁴ (good) and 10⁴ (bad): δ = 0, r = ∓5000, −λ log σ(−5000) = 5000 λ, without overflow."""
    assert bco(rows([-1e4 - 10, 1e4 - 10], [True, False]), HALF).loss.tolist() == pytest.approx([10000, 15000])


@pytest.mark.parametrize(
    ("good", "bad", "weights", "advice"),
    [
        # 7/6 is the middle of [1, 4/3]: 7/6 · 300/100 = 3.5; 300/(7/6 · 100) = 2.571…; with w_d = 2 the ratio is 6.
        (100, 300, (1, 1), "100 good and 300 bad completions weigh 0.333 : 1. Best is 1 : 1 to 4 : 3: "
         "--set loss.desirable_weight=3.5"),
        (300, 100, (1, 1), "300 good and 100 bad completions weigh 3 : 1. Best is 1 : 1 to 4 : 3: "
         "--set loss.undesirable_weight=2.57"),
        (3000, 1000, (2, 1), "3,000 good and 1,000 bad completions weigh 6 : 1. Best is 1 : 1 to 4 : 3: "
         "--set loss.undesirable_weight=5.14"),
        (100, 300, (3.5, 1), "100 good and 300 bad completions weigh 1.17 : 1."),
        (50, 50, (1, 1), "50 good and 50 bad completions weigh 1 : 1."),
        (4, 3, (1, 1), "4 good and 3 bad completions weigh 1.33 : 1."),
        (7, 0, (1, 1), "7 good and 0 bad completions: all labels are the same, so there is nothing to learn a "
         "difference from."),
    ],
)  # fmt: skip
def test_suggested_weights(good: int, bad: int, weights: tuple[float, float], advice: str) -> None:
    config = LabelConfig(desirable_weight=weights[0], undesirable_weight=weights[1])
    assert config.balance(good, bad) == advice


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.1, 10), st.floats(0.1, 10))
def test_what_is_suggested_balances(good: int, bad: int, desirable: float, undesirable: float) -> None:
    """The setting as it is typed, rounded, leads into [1, 4/3]: then nothing more is suggested."""
    config = LabelConfig(desirable_weight=desirable, undesirable_weight=undesirable)
    _, _, advice = config.balance(good, bad).partition("--set loss.")
    if advice:
        name, _, value = advice.partition("=")
        assert "--set" not in LabelConfig.build(config.model_dump() | {name: float(value)}).balance(good, bad)


@pytest.mark.parametrize("settings", [{"beta": 0}, {"desirable_weight": 0}, {"undesirable_weight": -1}, {"weight": 1}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LabelConfig.build(settings)


def test_only_kto_reads_controls_and_only_bco_couples_rows() -> None:
    assert {name: (LOSSES[name].inputs, LOSSES[name].couples_rows) for name in ("kto", "apo_zero_unpaired", "bco")} == {
        "kto": (ControlledLogprobs, False),
        "apo_zero_unpaired": (LabelledLogprobs, False),
        "bco": (LabelledLogprobs, True),
    }
