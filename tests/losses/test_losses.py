"""Every registered loss: finite differences, rows that do not read each other, weights; and SFT and reward by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.errors import ConfigError, UnknownNameError
from accord.losses import (
    LOSSES,
    BradleyTerryConfig,
    DFTConfig,
    LossOutput,
    PairScores,
    SFTConfig,
    TokenLogprobs,
    bradley_terry,
    dft,
    sft,
)

ROWS = 5
REQUIRED = {"mixture": {"parts": {"dpo": {"weight": 0.5}, "aot": {}, "simpo": {"weight": 2}}}}
"""Settings of the losses that cannot do without."""
STOPPED = {"dft": "its weight p", "bco": "its reward shift", "kto": "its KL estimate", "cispo": "its ratio"}
"""Losses that hold part of what they read constant; finite differences know of no such thing."""
CONSTANT = (
    *("ref_", "weight", "length", "control", "good"),
    *("behaviour", "advantage", "completion", "reference", "old_", "returns"),
)
"""Columns that no gradient flows into."""


def bind(name: str) -> tuple[Callable[[Any], LossOutput], type]:
    bound = LOSSES[name].bind(REQUIRED.get(name, {}))
    return lambda inputs: bound.loss.function(inputs, bound.config), bound.loss.inputs


def sample(record: type, seed: int = 0) -> Any:
    """A record of random columns of ROWS rows in float64: log-probabilities below 0, lengths of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    columns = {}
    for column in fields(record):
        uniform = torch.rand(ROWS, generator=generator, dtype=torch.float64)
        if "length" in column.name:
            columns[column.name] = (9 * uniform).ceil()
        elif column.name == "good_B":
            columns[column.name] = uniform > 0.5
        elif column.name == "completions":
            columns[column.name] = ROWS
        elif column.name == "completion_N":
            columns[column.name] = torch.tensor([1, 1, 0, 3, 0])
        elif column.name == "advantage_N":
            columns[column.name] = 2 * uniform - 1
        elif column.name == "control":
            columns[column.name] = uniform[0]
        elif "weight" in column.name:
            columns[column.name] = 0.5 + uniform
        else:
            columns[column.name] = -0.2 - 3 * uniform
    return record(**columns)


def leaves(inputs: Any) -> dict[str, Tensor]:
    """The columns that a gradient may flow into."""
    columns = {column.name: getattr(inputs, column.name) for column in fields(inputs)}
    return {name: values for name, values in columns.items() if not any(part in name for part in CONSTANT)}


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in STOPPED])
def test_gradients_by_finite_differences(name: str) -> None:
    """Central differences in float64 of the weighted sum, in every column of the record."""
    function, record = bind(name)
    inputs = sample(record)
    columns = {key: values.requires_grad_() for key, values in leaves(inputs).items()}

    def total(*values: Tensor) -> Tensor:
        changed = replace(inputs, **dict(zip(columns, values, strict=True)))
        return (changed.weight * function(changed).loss).sum()

    assert torch.autograd.gradcheck(total, tuple(columns.values()))


@pytest.mark.parametrize("name", list(LOSSES))
def test_there_is_a_gradient_and_none_of_constants(name: str) -> None:
    function, record = bind(name)
    inputs = sample(record)
    columns = {key: values.requires_grad_() for key, values in leaves(inputs).items()}
    gradients = torch.autograd.grad(function(inputs).loss.sum(), list(columns.values()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", list(LOSSES))
def test_loss_and_metrics_have_a_value_for_every_row(name: str) -> None:
    """Metrics may be NaN where they do not speak of a row; the loss may not."""
    function, record = bind(name)
    output = function(sample(record))
    assert output.loss.shape == (ROWS,)
    assert output.loss.isfinite().all()
    assert all(values.shape == (ROWS,) for values in output.metrics.values())


def _rows(values: Any, which: Any) -> Any:
    return values[which] if isinstance(values, Tensor) and values.ndim else values


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_order_of_a_batch_changes_nothing(name: str) -> None:
    """A permuted batch gives permuted losses; of a loss that couples rows, the same weighted sum."""
    function, record = bind(name)
    inputs, order = sample(record), torch.tensor([3, 0, 4, 2, 1])
    columns = {column.name: getattr(inputs, column.name) for column in fields(inputs)}
    other = record(**{key: _rows(values, order) for key, values in columns.items()})
    one, two = function(inputs).loss, function(other).loss
    torch.testing.assert_close((inputs.weight * one).sum(), (other.weight * two).sum())
    if not LOSSES[name].bind(REQUIRED.get(name, {})).loss.couples_rows:
        torch.testing.assert_close(one[order], two)


@pytest.mark.parametrize("name", list(LOSSES))
def test_only_a_loss_that_says_so_reads_other_rows(name: str) -> None:
    """The first row alone has the same loss."""
    function, record = bind(name)
    inputs = sample(record)
    columns = {column.name: getattr(inputs, column.name) for column in fields(inputs)}
    alone = record(**{key: _rows(values, slice(1)) for key, values in columns.items()})
    same = torch.allclose(function(alone).loss, function(inputs).loss[:1])
    assert same != LOSSES[name].bind(REQUIRED.get(name, {})).loss.couples_rows


def scores(chosen: float, rejected: float, margin: float = 0.0) -> PairScores:
    return PairScores(*(torch.tensor([value]) for value in (chosen, rejected, margin)), torch.ones(1), torch.ones(1))


def test_sft_by_hand(slope: Any) -> None:
    """Probabilities 1/2 and 1/8: −ln = 0.6931 and 2.0794; the slope is −1 per token."""
    inputs = TokenLogprobs(torch.tensor([0.5, 0.125]).log(), torch.ones(2))
    assert sft(inputs, SFTConfig()).loss.tolist() == pytest.approx([0.693147, 2.079442], abs=1e-6)
    assert slope(lambda x: sft(TokenLogprobs(x, torch.ones(1)), SFTConfig()), -0.7) == pytest.approx(-1)


def test_sft_with_label_smoothing_by_hand() -> None:
    """Probabilities (½, ¼, ¼), target the first, ε = 0.3: the cross-entropy to (0.8, 0.1, 0.1).

    0.8·log 2 + 0.2·log 4 = 1.2·log 2.
    """
    logprobs = torch.tensor([0.5, 0.25, 0.25]).log()
    loss = LOSSES["sft"].bind({"label_smoothing": 0.3})
    assert loss.loss.statistics == {"mean_logprob"}
    output = loss.loss.function(TokenLogprobs(logprobs[:1], torch.ones(1), logprobs.mean()[None]), loss.config)
    assert float(output.loss) == pytest.approx(1.2 * math.log(2), abs=1e-6)
    assert float(output.metrics["nll"]) == pytest.approx(math.log(2))
    assert LOSSES["sft"].bind({}).loss.statistics == frozenset()


def test_dft_by_hand() -> None:
    """Probabilities 1/2 and 1/8: p·(−ln p) = 0.346574 and 0.259930; the slope is −p, because p is held constant."""
    logprobs = torch.tensor([0.5, 0.125]).log().requires_grad_()
    output = dft(TokenLogprobs(logprobs, torch.ones(2)), DFTConfig())
    assert output.loss.tolist() == pytest.approx([0.346574, 0.259930], abs=1e-6)
    (gradient,) = torch.autograd.grad(output.loss.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([-0.5, -0.125])


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


def test_bradley_terry_slopes(slope: Any) -> None:
    """∂L/∂chosen = −(1 − σ(Δ − m)) + 2c(r₁ + r₂): −0.268941 at Δ = 1; with c = 0.1 and r = (2, 1) 0.331059."""

    def chosen(centre: float) -> Callable[[Tensor], LossOutput]:
        rest = [torch.tensor([value], dtype=torch.float64) for value in (1.0, 0.0, 1.0, 1.0)]
        return lambda x: bradley_terry(PairScores(x, *rest), BradleyTerryConfig(centre=centre))

    assert slope(chosen(0.0), 2.0) == pytest.approx(-0.268941, abs=1e-6)
    assert slope(chosen(0.1), 2.0) == pytest.approx(0.331059, abs=1e-6)


def test_a_larger_margin_costs_more() -> None:
    losses = [float(bradley_terry(scores(1, 0, margin), BradleyTerryConfig()).loss) for margin in (0.0, 1.0, 4.0)]
    assert losses == sorted(set(losses))


@pytest.mark.parametrize("settings", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"smoothing": 0.1}])
def test_sft_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LOSSES["sft"].bind(settings)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'dpo'"):
        LOSSES["dpoo"]
