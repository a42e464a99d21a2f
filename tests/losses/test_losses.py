"""Losses against numbers derived by hand, their limits, signs, finite differences, and the order of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accord.errors import ConfigError, UnknownNameError
from accord.losses import (
    LOSSES,
    BradleyTerryConfig,
    DPOConfig,
    LossOutput,
    PairScores,
    PreferenceLogprobs,
    SFTConfig,
    TokenLogprobs,
    bradley_terry,
    dpo,
    sft,
)

numbers = st.floats(-30, 30, width=32)


def preferences(*rows: tuple[float, float, float, float]) -> PreferenceLogprobs:
    columns = torch.tensor(rows).T
    return PreferenceLogprobs(*columns, torch.ones(len(rows)))


def scores(chosen: float, rejected: float, margin: float = 0.0) -> PairScores:
    return PairScores(*(torch.tensor([value]) for value in (chosen, rejected, margin)), torch.ones(1))


def slope(function: Callable[[Tensor], LossOutput], value: float) -> float:
    """∂loss/∂value by autograd, after it was compared with a central difference in float64."""
    leaf = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(leaf).loss.sum(), leaf)
    h = 1e-5
    with torch.no_grad():
        difference = float((function(leaf + h).loss - function(leaf - h).loss).sum()) / (2 * h)
    assert float(gradient) == pytest.approx(difference, abs=1e-7)
    return float(gradient)


def test_sft_by_hand() -> None:
    """Probabilities 1/2 and 1/8: −ln = 0.6931 and 2.0794; the slope is −1 per token."""
    inputs = TokenLogprobs(torch.tensor([0.5, 0.125]).log(), torch.ones(2))
    assert sft(inputs, SFTConfig()).loss.tolist() == pytest.approx([0.693147, 2.079442], abs=1e-6)
    assert slope(lambda x: sft(TokenLogprobs(x, torch.ones(1)), SFTConfig()), -0.7) == pytest.approx(-1)


def test_dpo_by_hand() -> None:
    """Chosen −12 against a reference of −13, rejected −15 against −14: Δ = 1 − (−1) = 2.

    β = 0.5: βΔ = 1, −log σ(1) = log(1 + e⁻¹) = 0.313262. Rewards 0.5 and −0.5.
    """
    output = dpo(preferences((-12, -15, -13, -14)), DPOConfig(beta=0.5))
    assert output.loss.tolist() == pytest.approx([0.313262], abs=1e-6)
    metrics = {name: values.tolist() for name, values in output.metrics.items()}
    assert metrics == {
        "rewards/chosen": [0.5],
        "rewards/rejected": [-0.5],
        "rewards/accuracies": [1.0],
        "rewards/margins": [1.0],
        "logps/chosen": [-12.0],
        "logps/rejected": [-15.0],
    }


def test_cdpo_by_hand() -> None:
    """βΔ = 1 and ε = 0.2: 0.8·0.313262 + 0.2·1.313262 = 0.513262."""
    output = dpo(preferences((-12, -15, -13, -14)), DPOConfig(beta=0.5, label_smoothing=0.2))
    assert output.loss.tolist() == pytest.approx([0.513262], abs=1e-6)


def test_dpo_starts_at_log_two_whatever_beta_and_smoothing() -> None:
    """Policy = reference: Δ = 0 and both terms are log 2."""
    for beta, smoothing in [(0.01, 0.0), (0.1, 0.3), (5.0, 0.49)]:
        output = dpo(preferences((-3, -9, -3, -9)), DPOConfig(beta=beta, label_smoothing=smoothing))
        assert output.loss.tolist() == pytest.approx([math.log(2)])


def test_dpo_slopes() -> None:
    """∂L/∂chosen = −β(1 − ε − σ(βΔ)): −0.5·(1 − 0.731059) = −0.134471 at βΔ = 1; with ε = 0.2 −0.034471."""

    def chosen(smoothing: float) -> Callable[[Tensor], LossOutput]:
        rest = [torch.tensor([value], dtype=torch.float64) for value in (-15.0, -13.0, -14.0, 1.0)]
        config = DPOConfig(beta=0.5, label_smoothing=smoothing)
        return lambda x: dpo(PreferenceLogprobs(x, *rest), config)

    def rejected(x: Tensor) -> LossOutput:
        rest = [torch.tensor([value], dtype=torch.float64) for value in (-13.0, -14.0, 1.0)]
        return dpo(PreferenceLogprobs(torch.full_like(x, -12.0), x, *rest), DPOConfig(beta=0.5))

    assert slope(chosen(0.0), -12.0) == pytest.approx(-0.134471, abs=1e-6)
    assert slope(chosen(0.2), -12.0) == pytest.approx(-0.034471, abs=1e-6)
    assert slope(rejected, -15.0) == pytest.approx(0.134471, abs=1e-6)


def test_dpo_limits() -> None:
    """β → 0: the loss tends to log 2 and its slope over β to −½. ε → ½: the least loss is at Δ = 0.

    A margin far on the right side costs nothing, far on the wrong side β|Δ|: both without overflow.
    """
    tiny = DPOConfig(beta=1e-6)
    assert float(dpo(preferences((-12, -15, -13, -14)), tiny).loss) == pytest.approx(math.log(2), abs=1e-5)
    rest = [torch.tensor([value], dtype=torch.float64) for value in (-15.0, -13.0, -14.0, 1.0)]
    assert slope(lambda x: dpo(PreferenceLogprobs(x, *rest), tiny), -12.0) / 1e-6 == pytest.approx(-0.5, abs=1e-4)
    half = DPOConfig(beta=1.0, label_smoothing=0.4999999)
    losses = [float(dpo(preferences((delta, 0, 0, 0)), half).loss) for delta in (-1.0, 0.0, 1.0)]
    assert losses[1] < losses[0] == pytest.approx(losses[2], abs=1e-5)
    far = dpo(preferences((1e4, 0, 0, 0), (-1e4, 0, 0, 0)), DPOConfig(beta=1.0)).loss
    assert far.tolist() == [0.0, 1e4]


def test_bradley_terry_by_hand() -> None:
    """Scores 2 and 1: −log σ(1) = 0.313262. Margin 0.5: −log σ(0.5) = 0.474077. Centring 0.1·(2 + 1)² = 0.9."""
    assert bradley_terry(scores(2, 1), BradleyTerryConfig()).loss.tolist() == pytest.approx([0.313262], abs=1e-6)
    assert bradley_terry(scores(2, 1, 0.5), BradleyTerryConfig()).loss.tolist() == pytest.approx([0.474077], abs=1e-6)
    centred = bradley_terry(scores(2, 1), BradleyTerryConfig(centre=0.1))
    assert centred.loss.tolist() == pytest.approx([1.213262], abs=1e-6)
    metrics = {name: values.tolist() for name, values in centred.metrics.items()}
    assert metrics == {"accuracy": [1.0], "margin": [1.0], "mean_reward": [1.5]}


def test_equal_scores_count_as_half_right() -> None:
    assert bradley_terry(scores(0, 0), BradleyTerryConfig()).metrics["accuracy"].tolist() == [0.5]
    assert bradley_terry(scores(0, 1), BradleyTerryConfig()).metrics["accuracy"].tolist() == [0.0]


def test_bradley_terry_slopes() -> None:
    """∂L/∂chosen = −(1 − σ(Δ − m)) + 2c(r₁ + r₂): −0.268941 at Δ = 1; with c = 0.1 and r = (2, 1) 0.331059."""

    def chosen(centre: float) -> Callable[[Tensor], LossOutput]:
        rest = [torch.tensor([value], dtype=torch.float64) for value in (1.0, 0.0, 1.0)]
        return lambda x: bradley_terry(PairScores(x, *rest), BradleyTerryConfig(centre=centre))

    assert slope(chosen(0.0), 2.0) == pytest.approx(-0.268941, abs=1e-6)
    assert slope(chosen(0.1), 2.0) == pytest.approx(0.331059, abs=1e-6)


def test_a_larger_margin_costs_more() -> None:
    losses = [float(bradley_terry(scores(1, 0, margin), BradleyTerryConfig()).loss) for margin in (0.0, 1.0, 4.0)]
    assert losses == sorted(set(losses))


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=2, max_size=6), st.randoms())
def test_the_order_of_a_batch_changes_no_row(rows: list[tuple[float, float, float, float]], random: Any) -> None:
    """No row reads another one: a permuted batch gives permuted losses and metrics."""
    order = list(range(len(rows)))
    random.shuffle(order)
    for function, config in [(dpo, DPOConfig()), (dpo, DPOConfig(label_smoothing=0.3))]:
        one, other = function(preferences(*rows), config), function(preferences(*(rows[i] for i in order)), config)
        assert torch.equal(one.loss[order], other.loss)
        assert all(torch.equal(values[order], other.metrics[name]) for name, values in one.metrics.items())
    columns = torch.tensor(rows).T
    one, other = (
        bradley_terry(PairScores(*part), BradleyTerryConfig(centre=0.1)) for part in (columns, columns[:, order])
    )
    assert torch.equal(one.loss[order], other.loss)


@given(numbers, numbers, numbers, numbers, st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_is_what_its_formula_says(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, smoothing: float
) -> None:
    """The formula in double precision with log(1 + eˣ), written as the papers do."""
    z = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    expected = (1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z))
    inputs = PreferenceLogprobs(
        *(torch.tensor([v], dtype=torch.float64) for v in (chosen, rejected, ref_chosen, ref_rejected, 1.0))
    )
    config = DPOConfig(beta=beta, label_smoothing=smoothing)
    assert float(dpo(inputs, config).loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "settings", [{"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"betta": 0.1}]
)
def test_dpo_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        DPOConfig.build(settings)


def test_the_registry_holds_each_loss_with_its_record() -> None:
    rows_of = ("sft", "dpo", "bradley_terry")
    rows = {name: (LOSSES[name].function, LOSSES[name].config, LOSSES[name].inputs) for name in rows_of}
    assert rows == {
        "sft": (sft, SFTConfig, TokenLogprobs),
        "dpo": (dpo, DPOConfig, PreferenceLogprobs),
        "bradley_terry": (bradley_terry, BradleyTerryConfig, PairScores),
    }
    with pytest.raises(UnknownNameError, match="Did you mean 'dpo'"):
        LOSSES["dpoo"]
