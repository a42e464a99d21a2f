"""Losses of pairs with a reference: numbers derived by hand, limits, signs, and what their shared settings do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accord.errors import ConfigError
from accord.losses import LOSSES, DPOConfig, LossOutput, PreferenceLogprobs, dpo

PAIR = (-12.0, -15.0, -13.0, -14.0)
"""ĉ = 1, r̂ = −1, Δ = 2; at β = ½ the rewards are ½ and −½ and βΔ = 1."""

FAMILY = [name for name in LOSSES if name != "mixture" and LOSSES[name].inputs is PreferenceLogprobs]
"""The losses of pairs that read a reference."""

numbers = st.floats(-30, 30, width=32)


def bind(name: str, **settings: Any) -> Callable[[PreferenceLogprobs], LossOutput]:
    bound = LOSSES[name].bind(settings)
    return lambda inputs: bound.loss.function(inputs, bound.config)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cost(x: float) -> float:
    """−log σ(x)."""
    return math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        # −log σ(1) = 0.313262.
        ("dpo", {}, 0.313262),
        # cDPO: 0.8·0.313262 + 0.2·1.313262.
        ("dpo", {"label_smoothing": 0.2}, 0.513262),
        # rDPO: (0.8·0.313262 − 0.2·1.313262) / 0.6 = −0.012042 / 0.6.
        ("robust", {"label_smoothing": 0.2}, -0.020072),
        # max(0, 1 − 1).
        ("hinge", {}, 0.0),
        # Lengths 4 and 2: (1/4 + 1/2 − 1)².
        ("ipo", {}, 0.0625),
        # −log σ(½ · (1/4 + 1/2)) = −log σ(0.375).
        ("sigmoid_norm", {}, 0.523123),
        # σ(1) = 0.731059: 0.731059·(−0.313262 − log 0.9) + 0.268941·(−1.313262 − log 0.1)
        #     = 0.731059·(−0.207901) + 0.268941·(0.989323).
        ("exo_pair", {"label_smoothing": 0.1}, 0.114082),
        # −log σ(½) − ½ log σ(−½) − ½ log σ(½) = 0.474077 + 0.487038 + 0.237038.
        ("nca_pair", {}, 1.198154),
        # −log σ(½) − log σ(½).
        ("bco_pair", {}, 0.948154),
        # (1 − 1)² + (−1 + 1)².
        ("sppo_hard", {}, 0.0),
        # 1 − σ(½) + σ(−½) = 2 · 0.377541.
        ("apo_zero", {}, 0.755081),
        # σ(½) + 1 − σ(1) = 0.622459 + 0.268941.
        ("apo_down", {}, 0.891401),
        # m = σ(1/0.5) = 0.880797: 0.119203·0.313262 + 0.880797·e⁻¹.
        ("discopop", {"tau": 0.5}, 0.361369),
        # One pair: the quantile is the pair, so this is DPO and cDPO.
        ("aot", {}, 0.313262),
        ("aot_unpaired", {"label_smoothing": 0.2}, 0.513262),
        # Forward KL: −e^(−1) + e^1 = 2.350402, −log σ(½ · 2.350402).
        ("dpo", {"divergence": "forward_kl"}, 0.269078),
        # Jensen–Shannon: log σ(1) − log σ(−1) = 1, −log σ(½).
        ("dpo", {"divergence": "js_divergence"}, 0.474077),
        # α = ½: (e^(½) − e^(−½)) / ½ = 2.084381 in Δ's place.
        ("dpo", {"divergence": "alpha_divergence", "divergence_alpha": 0.5}, 0.302089),
        # 0.313262 + 2 · 12/4.
        ("dpo", {"sft_weight": 2.0}, 6.313262),
    ],
)
def test_by_hand(name: str, settings: dict[str, Any], expected: float, pairs: Any) -> None:
    output = bind(name, beta=0.5, **settings)(pairs(PAIR, lengths=(4, 2)))
    assert output.loss.tolist() == pytest.approx([expected], abs=2e-6)


def test_metrics_are_rewards_and_log_probabilities(pairs: Any) -> None:
    """Whatever the loss, and whatever holds the policy to the reference: β times the log-ratio."""
    for name in FAMILY:
        metrics = {key: values.tolist() for key, values in bind(name, beta=0.5)(pairs(PAIR)).metrics.items()}
        assert metrics == {
            "rewards/chosen": [0.5],
            "rewards/rejected": [-0.5],
            "rewards/accuracies": [1.0],
            "rewards/margins": [1.0],
            "logps/chosen": [-12.0],
            "logps/rejected": [-15.0],
        }


@pytest.mark.parametrize("beta", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        # With policy = reference every log-ratio is 0, whatever β.
        ("dpo", {"label_smoothing": 0.3}, math.log(2)),
        ("dpo", {"divergence": "forward_kl"}, math.log(2)),
        ("robust", {"label_smoothing": 0.3}, math.log(2)),
        ("sigmoid_norm", {}, math.log(2)),
        ("aot", {}, math.log(2)),
        ("aot_unpaired", {}, math.log(2)),
        ("nca_pair", {}, 2 * math.log(2)),
        ("bco_pair", {}, 2 * math.log(2)),
        ("hinge", {}, 1.0),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        # Half of the logistic, half of the exponential loss.
        ("discopop", {}, (math.log(2) + 1) / 2),
        # KL of (½, ½) to (0.9, 0.1) = −log 2 − ½ log 0.09.
        ("exo_pair", {"label_smoothing": 0.1}, -math.log(2) - math.log(0.09) / 2),
    ],
)
def test_at_the_reference(name: str, settings: dict[str, Any], expected: float, beta: float, pairs: Any) -> None:
    output = bind(name, beta=beta, **settings)(pairs((-3, -9, -3, -9)))
    assert output.loss.tolist() == pytest.approx([expected])


def test_regressions_at_the_reference(pairs: Any) -> None:
    """(0 − 1/(2β))², once in IPO and twice in SPPO: 25 and 50 at β = 0.1. Both are 0 at their target of 5."""
    assert bind("ipo")(pairs((-3, -9, -3, -9))).loss.tolist() == pytest.approx([25])
    assert bind("sppo_hard")(pairs((-3, -9, -3, -9))).loss.tolist() == pytest.approx([50])
    assert bind("ipo")(pairs((7, -9, -3, -9), lengths=(2, 3))).loss.tolist() == pytest.approx([0])
    assert bind("sppo_hard")(pairs((2, -14, -3, -9))).loss.tolist() == pytest.approx([0])


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "discopop"])
def test_at_the_reference_a_loss_pulls_the_pair_apart(name: str, pairs: Any) -> None:
    """∂L/∂c ≤ 0 and ∂L/∂r ≥ 0 there, and one of them is not zero."""
    values = torch.tensor([[-3.0], [-9.0]], dtype=torch.float64, requires_grad=True)
    inputs = replace(pairs((-3, -9, -3, -9)), chosen_B=values[0], rejected_B=values[1])
    (gradient,) = torch.autograd.grad(bind(name)(inputs).loss.sum(), values)
    chosen, rejected = gradient[:, 0].tolist()
    assert rejected - chosen > 0
    assert rejected >= 0
    assert chosen <= 0


def test_discopop_is_not_monotone(pairs: Any, slope: Any) -> None:
    """∂L/∂(βΔ) at 0 is −¾ + (1 − log 2)/(4τ): +0.784264 at τ = 0.05, and −0.673287 at τ = 1."""
    for tau, expected in [(0.05, 0.784264), (1.0, -0.673287)]:
        function = bind("discopop", beta=1.0, tau=tau)
        measured = slope(lambda x, function=function: function(replace(pairs((0, 0, 0, 0)), chosen_B=x)), 0.0)
        assert measured == pytest.approx(expected, abs=1e-6)


def test_slopes_by_hand(pairs: Any, slope: Any) -> None:
    """∂L/∂chosen at βΔ = 1 and β = ½.

    DPO −β(1 − ε − σ(1)): −0.134471, with ε = 0.2 −0.034471. Hinge, just short of its kink, −β. IPO 2·(¾ − 1)/4.
    SPPO 2·(1 − 1). APO-zero −β·σ(½)σ(−½). APO-down β·(σ(½)σ(−½) − σ(1)σ(−1)).
    """

    def at(name: str, where: float = -12.0, **settings: Any) -> float:
        function = bind(name, beta=0.5, **settings)
        return float(slope(lambda x: function(replace(pairs(PAIR, lengths=(4, 2)), chosen_B=x)), where))

    assert at("dpo") == pytest.approx(-0.134471, abs=1e-6)
    assert at("dpo", label_smoothing=0.2) == pytest.approx(-0.034471, abs=1e-6)
    assert at("hinge", -12.1) == pytest.approx(-0.5)
    assert at("hinge", -11.9) == 0
    assert at("ipo") == pytest.approx(-0.125)
    assert at("sppo_hard") == pytest.approx(0)
    assert at("apo_zero") == pytest.approx(-0.5 * sigmoid(0.5) * sigmoid(-0.5))
    assert at("apo_down") == pytest.approx(0.5 * (sigmoid(0.5) * sigmoid(-0.5) - sigmoid(1) * sigmoid(-1)))


def test_dpo_limits(pairs: Any, slope: Any) -> None:
    """β → 0: the loss tends to log 2 and its slope over β to −½. ε → ½: the least loss is at Δ = 0."""
    tiny = bind("dpo", beta=1e-6)
    assert float(tiny(pairs(PAIR)).loss) == pytest.approx(math.log(2), abs=1e-5)
    assert slope(lambda x: tiny(replace(pairs(PAIR), chosen_B=x)), -12.0) / 1e-6 == pytest.approx(-0.5, abs=1e-4)
    half = bind("dpo", beta=1.0, label_smoothing=0.4999999)
    losses = [float(half(pairs((delta, 0, 0, 0))).loss) for delta in (-1.0, 0.0, 1.0)]
    assert losses[1] < losses[0] == pytest.approx(losses[2], abs=1e-5)


def test_robust_dpo_is_unbiased(pairs: Any) -> None:
    """Of a pair that is recorded right with 0.7 and wrong with 0.3, the expected loss is DPO's of the true order."""
    right, wrong = pairs(PAIR), pairs((-15, -12, -14, -13))
    noisy = bind("robust", beta=0.5, label_smoothing=0.3)
    expected = 0.7 * noisy(right).loss + 0.3 * noisy(wrong).loss
    torch.testing.assert_close(expected, bind("dpo", beta=0.5)(right).loss)


def test_exo_is_zero_where_the_policy_has_the_labels_odds(pairs: Any) -> None:
    """σ(βΔ) = 1 − ε makes the KL zero: βΔ = log(0.9 / 0.1) = 2.197225."""
    output = bind("exo_pair", beta=1.0, label_smoothing=0.1)(pairs((math.log(9), 0, 0, 0)))
    assert float(output.loss) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("alpha", "divergence"), [(1e-6, "reverse_kl"), (1 - 1e-6, "forward_kl")])
def test_the_alpha_divergence_lies_between_the_two_kls(alpha: float, divergence: str, pairs: Any) -> None:
    near = bind("dpo", divergence="alpha_divergence", divergence_alpha=alpha)(pairs(PAIR))
    torch.testing.assert_close(near.loss, bind("dpo", divergence=divergence)(pairs(PAIR)).loss, atol=1e-5, rtol=0)


def test_a_divergence_and_its_alpha_go_together() -> None:
    for settings in ({"divergence": "alpha_divergence"}, {"divergence_alpha": 0.5}):
        with pytest.raises(ConfigError, match="go together"):
            LOSSES["ipo"].bind(settings)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("far", [1e3, -1e3])
def test_far_log_ratios_stay_finite(name: str, far: float) -> None:
    """A policy that left its reference by 1,000 nats, either way, in float32: loss and gradient are numbers.

    For every divergence that the loss has. `discopop` grows like e^(−βΔ) only where that is the smaller factor.
    """
    settings: list[dict[str, Any]] = [{}]
    if "divergence" in LOSSES[name].config.model_fields:
        settings += [{"divergence": kind} for kind in ("forward_kl", "js_divergence")]
        settings += [{"divergence": "alpha_divergence", "divergence_alpha": 0.5}]
    for some in settings:
        chosen = torch.tensor([far], requires_grad=True)
        one = torch.ones(1)
        inputs = PreferenceLogprobs(
            chosen_B=chosen, rejected_B=-far * one, ref_chosen_B=0 * one, ref_rejected_B=0 * one, weight_B=one,
            chosen_length_B=one, rejected_length_B=one, chosen_tail_B=0 * one, rejected_tail_B=0 * one,
        )  # fmt: skip
        loss = bind(name, **some)(inputs).loss
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert loss.isfinite().all(), some
        assert gradient.isfinite().all(), some


def test_length_desensitising_by_hand(pairs: Any) -> None:
    """ĉ = 1 of which 0.6 lies beyond the rejected one's length: at α = ¼ it counts 1 − ¾·0.6 = 0.55, Δ = 1.55.

    At α = 1 nothing changes; at α = 0 only the common length counts.
    """
    inputs = pairs(PAIR, chosen_tail_B=torch.tensor([0.6], dtype=torch.float64))
    for alpha, delta in [(0.25, 1.55), (1.0, 2.0), (0.0, 1.4)]:
        output = bind("dpo", beta=0.5, ld_alpha=alpha)(inputs)
        assert float(output.loss) == pytest.approx(cost(0.5 * delta))
        assert float(output.metrics["rewards/chosen"]) == pytest.approx(0.5 * (delta - 1))


def test_wpo_weights_by_hand(pairs: Any) -> None:
    """log Σp² of −10 and −12 over 4 and 2 tokens: weights e^((−12 + 10)/4) and e^((−15 + 12)/2), together e^(−2)."""
    one = torch.ones(1, dtype=torch.float64)
    squares = {"chosen_log_sum_squares_B": -10 * one, "rejected_log_sum_squares_B": -12 * one}
    inputs = pairs(PAIR, lengths=(4, 2), **squares)
    output = bind("dpo", beta=0.5, wpo=True)(inputs)
    assert float(output.loss) == pytest.approx(cost(1.0) * math.exp(-2))


def test_wpo_weights_are_constants(pairs: Any) -> None:
    """The gradient is the weight times the gradient without it."""
    one = torch.ones(1, dtype=torch.float64)
    squares = {"chosen_log_sum_squares_B": -10 * one, "rejected_log_sum_squares_B": -12 * one}
    gradients = []
    for wpo in (False, True):
        chosen = torch.tensor([-12.0], dtype=torch.float64, requires_grad=True)
        inputs = replace(pairs(PAIR, lengths=(4, 2), **squares), chosen_B=chosen)
        gradients += torch.autograd.grad(bind("ipo", beta=0.2, wpo=wpo)(inputs).loss.sum(), chosen)
    torch.testing.assert_close(gradients[1], gradients[0] * math.exp(-2))


def test_only_wpo_asks_for_a_statistic() -> None:
    for name in FAMILY:
        assert LOSSES[name].bind({}).loss.statistics == frozenset()
        if "wpo" in LOSSES[name].config.model_fields:
            assert LOSSES[name].bind({"wpo": True}).loss.statistics == {"log_sum_squares"}


@given(numbers, numbers, numbers, numbers, st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_is_what_its_formula_says(
    pairs: Any, chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, smoothing: float
) -> None:
    """The formula in double precision with log(1 + eˣ), written as the papers do."""
    z = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    expected = (1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z))
    output = dpo(pairs((chosen, rejected, ref_chosen, ref_rejected)), DPOConfig(beta=beta, label_smoothing=smoothing))
    assert float(output.loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "settings", [{"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"betta": 0.1}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    for name in ("dpo", "robust", "exo_pair", "aot"):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            LOSSES[name].bind(settings)


def test_aot_sorts_margins(pairs: Any) -> None:
    """Margins 1 and 3 of the policy, 2 and −1 of the reference: sorted, 1 − (−1) = 2 and 3 − 2 = 1, each DPO's cost."""
    output = bind("aot", beta=0.5)(pairs((1, 0, 2, 0), (3, 0, -1, 0)))
    assert output.loss.tolist() == pytest.approx([cost(1.0), cost(0.5)])


def test_aot_unpaired_sorts_completions(pairs: Any) -> None:
    """ĉ = 4, 1 and r̂ = 0, 3: sorted, 1 − 0 and 4 − 3, whichever pair they came from."""
    output = bind("aot_unpaired", beta=0.5)(pairs((4, 0, 0, 0), (1, 3, 0, 0)))
    assert output.loss.tolist() == pytest.approx([cost(0.5), cost(0.5)])
    swapped = bind("aot_unpaired", beta=0.5)(pairs((4, 3, 0, 0), (1, 0, 0, 0)))
    assert swapped.loss.sum() == pytest.approx(output.loss.sum())


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5), st.data())
def test_aot_of_a_row_of_weight_two_is_aot_of_two_rows(pairs: Any, rows: list[Any], data: Any) -> None:
    """Weights are masses: the transport of a sample with repeated rows is that of the weighted sample."""
    times = data.draw(st.lists(st.integers(1, 3), min_size=len(rows), max_size=len(rows)))
    weight_B = torch.tensor(times, dtype=torch.float64)
    repeated = [row for row, count in zip(rows, times, strict=True) for _ in range(count)]
    for name in ("aot", "aot_unpaired"):
        function = bind(name, beta=0.3, label_smoothing=0.1)
        weighted = weight_B * function(pairs(*rows, weight_B=weight_B)).loss
        assert float(weighted.sum()) == pytest.approx(float(function(pairs(*repeated)).loss.sum()), rel=1e-9)


def test_a_mixture_is_the_weighted_sum_of_its_parts(pairs: Any, slope: Any) -> None:
    """MPO: 0.8·DPO + 0.2·BCO + an SFT term, the last by way of DPO's setting, so with its weight over 0.8."""
    parts = {"dpo": {"weight": 0.8, "beta": 0.5, "sft_weight": 1.25}, "bco_pair": {"weight": 0.2, "beta": 0.5}}
    output = bind("mixture", parts=parts)(pairs(PAIR, lengths=(4, 2)))
    assert float(output.loss) == pytest.approx(0.8 * cost(1.0) + 0.2 * 2 * cost(0.5) + 12 / 4)
    assert float(output.metrics["loss/bco_pair"]) == pytest.approx(2 * cost(0.5))
    assert float(output.metrics["rewards/chosen"]) == 0.5

    def of_chosen(x: Tensor) -> LossOutput:
        return bind("mixture", parts=parts)(replace(pairs(PAIR, lengths=(4, 2)), chosen_B=x))

    expected = -0.8 * 0.5 * sigmoid(-1) - 0.2 * 0.5 * sigmoid(-0.5) - 1 / 4
    assert slope(of_chosen, -12.0) == pytest.approx(expected)


def test_a_mixture_needs_what_its_parts_need() -> None:
    """A reference, other rows or a statistic only if one part does."""

    def needs(*parts: str, **settings: Any) -> tuple[Any, ...]:
        loss = LOSSES["mixture"].bind({"parts": dict.fromkeys(parts, settings)}).loss
        return loss.inputs.__name__, loss.couples_rows, set(loss.statistics)

    assert needs("simpo", "orpo") == ("PairLogprobs", False, set())
    assert needs("simpo", "dpo") == ("PreferenceLogprobs", False, set())
    assert needs("dpo", "aot") == ("PreferenceLogprobs", True, set())
    assert needs("dpo", "apo_zero", wpo=True) == ("PreferenceLogprobs", False, {"log_sum_squares"})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "parts"),
        ({"dpoo": {}}, "Did you mean 'dpo'"),
        ({"dpo": {"betta": 0.1}}, "betta"),
        ({"dpo": {"weight": 0}}, r"parts\.dpo\.weight"),
        ({"dpo": {"weight": "much"}}, r"parts\.dpo\.weight"),
        ({"sft": {}}, "not a loss of pairs"),
        ({"bradley_terry": {}}, "not a loss of pairs"),
    ],
)
def test_a_mixture_refuses_wrong_parts(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LOSSES["mixture"].bind({"parts": parts})
