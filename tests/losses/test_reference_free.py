"""Losses of pairs without a reference: numbers derived by hand, limits and signs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from accord.losses import LOSSES, LossOutput, PairLogprobs

FREE = [name for name in LOSSES if LOSSES[name].inputs is PairLogprobs]


def bind(name: str, **settings: Any) -> Callable[[PairLogprobs], LossOutput]:
    bound = LOSSES[name].bind(settings)
    return lambda inputs: bound.loss.function(inputs, bound.config)


def pair(chosen: float, rejected: float, lengths: tuple[float, float] = (4, 2)) -> PairLogprobs:
    columns = [torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, *lengths, 1)]
    names = ("chosen_B", "rejected_B", "chosen_length_B", "rejected_length_B", "weight_B")
    return PairLogprobs(**dict(zip(names, columns, strict=True)))


def test_these_are_without_a_reference() -> None:
    assert FREE == ["cpo", "orpo", "simpo"]


def test_simpo_by_hand() -> None:
    """Means −2/4 and −3/2, β = 2, γ = ½: −log σ(−1 + 3 − ½) = −log σ(1.5) = 0.201413; rewards −1 and −3."""
    output = bind("simpo", gamma=0.5)(pair(-2, -3))
    assert float(output.loss) == pytest.approx(0.201413, abs=1e-6)
    assert {key: values.tolist() for key, values in output.metrics.items()} == {
        "rewards/chosen": [-1.0],
        "rewards/rejected": [-3.0],
        "rewards/accuracies": [1.0],
        "rewards/margins": [2.0],
        "logps/chosen": [-2.0],
        "logps/rejected": [-3.0],
    }
    # With noise: 0.9·0.201413 + 0.1·1.701413. With an SFT term: + 2 · ½.
    assert float(bind("simpo", gamma=0.5, label_smoothing=0.1)(pair(-2, -3)).loss) == pytest.approx(0.351413, abs=1e-6)
    assert float(bind("simpo", gamma=0.5, sft_weight=2.0)(pair(-2, -3)).loss) == pytest.approx(1.201413, abs=1e-6)


def test_alphapo_by_hand() -> None:
    """p = e^−½ and e^−3/2. α = 1: 1 − 1/p = −0.648721 and −3.481689; α = −1: p − 1 = −0.393469 and −0.77687.

    Margins 2·2.832968 − ½ and 2·0.383401 − ½.
    """
    for alpha, loss, rewards in [(1.0, 0.005691, (-1.297443, -6.963378)), (-1.0, 0.568618, (-0.786939, -1.553740))]:
        output = bind("simpo", gamma=0.5, alpha=alpha)(pair(-2, -3))
        assert float(output.loss) == pytest.approx(loss, abs=1e-6)
        shown = (float(output.metrics["rewards/chosen"]), float(output.metrics["rewards/rejected"]))
        assert shown == pytest.approx(rewards, abs=1e-6)
    for alpha in (1e-7, -1e-7):
        torch.testing.assert_close(bind("simpo", alpha=alpha)(pair(-2, -3)).loss, bind("simpo")(pair(-2, -3)).loss)
    hopeless = pair(-2, -1e4)
    hopeless.rejected_B.requires_grad_()
    loss = bind("simpo", alpha=1.0)(hopeless).loss.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hopeless.rejected_B.grad).all()


def test_cpo_by_hand() -> None:
    """β = ½: −log σ(½·(−2 + 3)) + 2/4 = 0.474077 + ½."""
    assert float(bind("cpo", beta=0.5)(pair(-2, -3)).loss) == pytest.approx(0.974077, abs=1e-6)
    assert float(bind("cpo", beta=0.5, sft_weight=0.0)(pair(-2, -3)).loss) == pytest.approx(0.474077, abs=1e-6)


def test_orpo_by_hand() -> None:
    """Mean probabilities ½ (odds 1) and ¼ (odds ⅓): log odds ratio log 3, −log σ(log 3) = log(4/3), and −log ½.

    λ = 0.1: 0.693147 + 0.1·0.287682.
    """
    output = bind("orpo")(pair(4 * math.log(0.5), 2 * math.log(0.25)))
    assert float(output.loss) == pytest.approx(0.721915, abs=1e-6)
    assert float(output.metrics["log_odds"]) == pytest.approx(math.log(3))
    assert float(output.metrics["nll"]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("probability", [1e-30, 1e-4, 0.3, 0.499, 0.501, 0.9, 0.9999])
def test_orpo_keeps_its_digits(probability: float) -> None:
    """Log odds of p against p/(1−p) in double precision, in float32 to a millionth: near 0, near ½ and near 1."""
    mean = torch.tensor([math.log(probability)])
    half = torch.tensor([math.log(0.5)])  # odds 1
    one = torch.ones(1)
    inputs = PairLogprobs(chosen_B=mean, rejected_B=half, chosen_length_B=one, rejected_length_B=one, weight_B=one)
    exact = math.exp(float(mean))
    expected = math.log(exact) - math.log1p(-exact)
    assert float(bind("orpo")(inputs).metrics["log_odds"]) == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("chosen", [0.0, -1e-9, -1e4])
def test_orpo_of_certainty_and_of_impossibility_is_finite(chosen: float) -> None:
    leaf = torch.tensor([chosen], requires_grad=True)
    one = torch.ones(1)
    inputs = PairLogprobs(chosen_B=leaf, rejected_B=-one, chosen_length_B=one, rejected_length_B=one, weight_B=one)
    loss = bind("orpo")(inputs).loss
    loss.backward()
    assert loss.isfinite().all()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", FREE)
def test_better_chosen_and_worse_rejected_cost_less(name: str) -> None:
    function = bind(name)
    losses = [float(function(pair(*both)).loss) for both in [(-2, -3), (-1.5, -3), (-1.5, -4)]]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


def test_limits() -> None:
    """Equal means cost log 2 without γ. SimPO's γ → ∞ costs γ more and more exactly. β → 0 leaves log(1 + e^γ)."""
    same = pair(-2, -1)  # both −½ per token
    assert float(bind("simpo", gamma=0.0)(same).loss) == pytest.approx(math.log(2))
    assert float(bind("simpo", gamma=40.0)(same).loss) == pytest.approx(40)
    assert float(bind("simpo", beta=1e-9, gamma=0.5)(pair(-2, -30)).loss) == pytest.approx(math.log1p(math.exp(0.5)))
    assert float(bind("orpo", sft_weight=0.0, beta=1.0)(same).loss) == pytest.approx(math.log(2))
    assert float(bind("cpo", sft_weight=0.0)(pair(-2, -2)).loss) == pytest.approx(math.log(2))


def test_cpo_is_dpo_with_a_uniform_reference(pairs: Any) -> None:
    """A reference that gives every completion the same log-probability cancels out of Δ."""
    bound = LOSSES["dpo"].bind({"beta": 0.3})
    expected = bound.loss.function(pairs((-2, -3, -7, -7)), bound.config).loss
    torch.testing.assert_close(bind("cpo", beta=0.3, sft_weight=0.0)(pair(-2, -3)).loss, expected)


def test_lengths_do_not_matter_to_cpo_and_do_to_simpo() -> None:
    short, long = pair(-2, -3), replace(pair(-2, -3), chosen_length_B=torch.tensor([40.0], dtype=torch.float64))
    free = bind("cpo", sft_weight=0.0)
    assert float(free(short).loss) == float(free(long).loss)
    assert float(bind("simpo")(short).loss) > float(bind("simpo")(long).loss)
