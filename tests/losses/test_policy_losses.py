"""Losses of rollouts: by hand, against TRL's formulas, and against the exact policy gradient of a world small enough
to enumerate."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.errors import ConfigError
from accord.losses import LOSSES, LossOutput, ReferencedRolloutTokens, RolloutTokens, ValueTokens

NAMES = ("ppo_clip", "cispo", "reinforce", "ppo")


def apply(name: str, inputs: Any, **settings: Any) -> LossOutput:
    bound = LOSSES[name].bind(settings)
    return bound.loss.function(inputs, bound.config)


def rollout(ratios: Any, advantages: Any, completions: Any = None, **fields: Any) -> RolloutTokens:
    """Tokens of these ratios; all were sampled with probability ½; weights 1."""
    ratio_N = torch.tensor(ratios, dtype=torch.float64)
    behaviour_N = torch.full_like(ratio_N, 0.5).log()
    place_N = torch.arange(len(ratio_N)) if completions is None else torch.tensor(completions)
    return RolloutTokens(
        logprobs_N=(behaviour_N + ratio_N.log()).requires_grad_(),
        behaviour_N=behaviour_N,
        advantage_N=torch.tensor(advantages, dtype=torch.float64),
        weight_N=torch.ones_like(ratio_N),
        completion_N=place_N,
        completions=int(place_N.max()) + 1,
        **fields,
    )


def slopes(inputs: RolloutTokens, output: LossOutput) -> list[float]:
    (gradient,) = torch.autograd.grad((inputs.weight * output.loss).sum(), inputs.logprobs_N)
    return gradient.tolist()


def test_ppo_clip_by_hand() -> None:
    """Clip 0.2 and 0.3. A good token stops at 1.3, a bad one at 0.8; inside, −ρA has the slope −ρA in log π."""
    inputs = rollout([1.0, 1.5, 0.5, 1.5, 0.5], [2.0, 2.0, 2.0, -2.0, -2.0])
    output = apply("ppo_clip", inputs, clip_low=0.2, clip_high=0.3)
    assert output.loss.tolist() == pytest.approx([-2.0, -2.6, -1.0, 3.0, 1.6])
    assert slopes(inputs, output) == pytest.approx([-2.0, 0.0, -1.0, 3.0, 0.0])
    assert output.metrics["clip_ratio/high_mean"].tolist() == [0, 1, 0, 0, 0]
    assert output.metrics["clip_ratio/low_mean"].tolist() == [0, 0, 0, 0, 1]
    assert output.metrics["clip_ratio/region_mean"].tolist() == [0, 1, 0, 0, 1]


def test_dual_clip_by_hand() -> None:
    """A bad token of ratio 5 costs 3·|A| and has no gradient; a good one is as without."""
    inputs = rollout([5.0, 2.0, 5.0], [-2.0, -2.0, 2.0])
    output = apply("ppo_clip", inputs, dual_clip=3.0)
    assert output.loss.tolist() == pytest.approx([6.0, 4.0, -2.4])
    assert slopes(inputs, output) == pytest.approx([0.0, 4.0, 0.0])
    assert output.metrics["clip_ratio/dual_mean"].tolist() == [1, 0, 0]


def test_ratios_of_completions_by_hand() -> None:
    """Ratios 2 and ½·… of one completion: 2 and 8 have the mean 4 (geometric) and the product 16; 1.1 stands alone."""
    inputs = rollout([2.0, 1.1, 8.0], [-1.0, 1.0, -1.0], completions=[0, 1, 0])
    mean = apply("ppo_clip", inputs, ratio_level="sequence_mean")
    product = apply("ppo_clip", inputs, ratio_level="sequence_sum")
    assert mean.loss.tolist() == pytest.approx([4.0, -1.1, 4.0])
    assert product.loss.tolist() == pytest.approx([16.0, -1.1, 16.0])
    assert slopes(inputs, mean) == pytest.approx([4.0, -1.1, 4.0])  # two tokens · 4 · ½
    assert slopes(inputs, product) == pytest.approx([32.0, -1.1, 32.0])


def test_cispo_and_reinforce_by_hand() -> None:
    """log π = log(ρ/2). CISPO weighs by min(ρ, 2) and clips no gradient; REINFORCE weighs by nothing."""
    inputs = rollout([1.0, 6.0], [3.0, 3.0])
    output = apply("cispo", inputs, max_ratio=2.0)
    assert output.loss.tolist() == pytest.approx([3 * 0.6931472, -2 * 3 * 1.0986123])
    assert slopes(inputs, output) == pytest.approx([-3.0, -6.0])
    assert output.metrics["cispo_clip_ratio"].tolist() == [0, 1]
    assert slopes(inputs, apply("reinforce", inputs)) == pytest.approx([-3.0, -3.0])


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.6931472), ("k2", 0.2402265), ("k3", 0.1931472)])
def test_kl_in_the_loss_by_hand(estimator: str, expected: float) -> None:
    """π = ½ and π_ref = ¼: d = −log 2, so k1 = log 2, k2 = (log 2)²/2, k3 = ½ + log 2 − 1. At ρ = 2 twice that."""
    on = replace(rollout([1.0], [0.0]), reference_N=torch.tensor([0.25], dtype=torch.float64).log())
    off = replace(on, behaviour_N=torch.tensor([0.25], dtype=torch.float64).log())
    for inputs, factor in ((on, 1.0), (off, 2.0)):
        output = apply("ppo_clip", inputs, kl_coefficient=0.1, kl_estimator=estimator)
        assert output.metrics["kl"].tolist() == pytest.approx([factor * expected])
        assert output.loss.tolist() == pytest.approx([0.1 * factor * expected])
    if estimator != "k1":
        plain = apply("ppo_clip", off, kl_coefficient=0.1, kl_estimator=estimator, kl_importance=False)
        assert plain.loss.tolist() == pytest.approx([0.1 * expected])


def test_an_entropy_bonus_is_taken_from_the_loss() -> None:
    inputs = replace(rollout([1.0], [2.0]), entropy_N=torch.tensor([1.5], dtype=torch.float64))
    output = apply("ppo_clip", inputs, entropy_coefficient=0.1)
    assert output.loss.tolist() == pytest.approx([-2.15])
    assert output.metrics["entropy"].tolist() == [1.5]


def test_the_value_loss_by_hand() -> None:
    """Old value 0, return 1. V = 0.1: ½·0.81. V = 0.5, cut to 0.2: ½·0.64. V = 2, cut to 0.2: ½·max(1, 0.64)."""
    value_N = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    zero_N, one_N = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    output = apply("value", ValueTokens(value_N, zero_N, one_N, one_N))
    assert output.loss.tolist() == pytest.approx([0.405, 0.32, 0.5])
    (gradient,) = torch.autograd.grad(output.loss.sum(), value_N)
    assert gradient.tolist() == pytest.approx([-0.9, 0.0, 1.0])
    assert output.metrics["val/clipfrac_avg"].tolist() == [0, 1, 0]
    free = apply("value", ValueTokens(value_N, zero_N, one_N, one_N), value_clip=0.0)
    assert free.loss.tolist() == pytest.approx([0.405, 0.125, 0.5])


def test_ppo_is_the_policy_loss_and_a_part_of_the_value_loss() -> None:
    numbers = [torch.tensor([x], dtype=torch.float64) for x in (0.5, 0.0, 1.0)]
    inputs = rollout([1.5], [2.0], values_N=numbers[0], old_values_N=numbers[1], returns_N=numbers[2])
    output = apply("ppo", inputs, value_coefficient=0.5)
    assert output.loss.tolist() == pytest.approx([-2.4 + 0.5 * 0.32])
    assert output.metrics["loss/policy_avg"].tolist() == pytest.approx([-2.4])
    assert output.metrics["loss/value_avg"].tolist() == pytest.approx([0.32])


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("clip_low", 0.999),
        ("clip_high", 0.9),
        ("dual_clip", None),
        ("ratio_level", "token"),
        ("value_clip", 0.0),
        ("value_coefficient", 1e-9),
        ("entropy_coefficient", 0.0),
        ("kl_coefficient", 0.0),
        ("kl_importance", True),
    ],
)
def test_taking_a_detail_of_ppo_away_changes_the_gradient(name: str, without: Any) -> None:
    """Three completions of two tokens: a bad one of low ratio, a good and a bad one of high ratio, and values that
    have moved."""
    details: dict[str, Any] = {
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": 2.0,
        "ratio_level": "sequence_mean",
        "value_clip": 0.2,
        "value_coefficient": 0.5,
        "entropy_coefficient": 0.1,
        "kl_coefficient": 0.05,
        "kl_importance": False,
    }

    def gradient(settings: dict[str, Any]) -> list[float]:
        """In log-probabilities, values and entropies."""
        ratios, advantages = [0.5, 0.6, 1.3, 1.9, 3.0, 2.0], [-1.0, -1.0, 2.0, 2.0, -2.0, -2.0]
        inputs = rollout(ratios, advantages, [0, 0, 1, 1, 2, 2])
        leaves = [
            torch.tensor(values, dtype=torch.float64, requires_grad=True)
            for values in ([0.1, 0.5, 2.0, -0.5, 0.0, 1.0], [1.0] * 6)
        ]
        zero_N, one_N = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
        inputs = replace(inputs, values_N=leaves[0], entropy_N=leaves[1], old_values_N=zero_N, returns_N=one_N)
        inputs = replace(inputs, reference_N=torch.full_like(zero_N, 0.3).log())
        loss = apply("ppo", inputs, **settings).loss.sum()
        found = torch.autograd.grad(loss, [inputs.logprobs_N, *leaves], allow_unused=True, materialize_grads=True)
        return torch.cat(found).tolist()

    changed = {**details, name: without}
    if name == "kl_coefficient":
        del changed["kl_importance"]  # a setting without an effect is an error
    assert gradient(changed) != pytest.approx(gradient(details), abs=1e-3)


def test_effective_sample_size_by_hand() -> None:
    """Ratios 1 and 3: mean 2, mean square 5, so the variance is 1 and (Σρ)²/(N·Σρ²) = 16/20."""
    bound = LOSSES["ppo_clip"].bind({})
    metrics = bound.loss.function(rollout([1.0, 3.0], [1.0, 1.0]), bound.config).metrics
    assert bound.loss.derive is not None
    found = bound.loss.derive({name: float(values.detach().mean()) for name, values in metrics.items()})
    assert found == pytest.approx({"val/ratio_var": 1.0, "effective_sample_size": 0.8})
    assert metrics["policy/approxkl_avg"].tolist() == pytest.approx([0.0, 0.5 * 1.0986123**2])


@pytest.mark.parametrize("name", ["ppo_clip", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence_mean", "sequence_sum"])
def test_a_ratio_beyond_all_numbers_has_a_finite_gradient(name: str, level: str) -> None:
    inputs = rollout([1.0, 1.0], [1.0, -1.0])
    inputs = replace(inputs, behaviour_N=torch.tensor([-2000.0, -2000.0], dtype=torch.float64))
    output = apply(name, inputs, ratio_level=level)
    assert output.loss.isfinite().all()
    assert all(abs(slope) < float("inf") for slope in slopes(inputs, output))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ppo_clip", {"kl_estimator": "k2"}, "no effect while kl_coefficient is 0"),
        ("ppo_clip", {"kl_importance": False}, "no effect while kl_coefficient is 0"),
        ("reinforce", {"kl_coefficient": 0.1, "kl_estimator": "k1", "kl_importance": False}, "gradient of log π"),
        ("ppo_clip", {"dual_clip": 1.1}, r"above 1 \+ clip_high"),
        ("reinforce", {"clip_low": 0.1}, "clip_low"),
        ("cispo", {"clip_high": 0.1}, "clip_high"),
        ("ppo_clip", {"value_clip": 0.1}, "value_clip"),
        ("value", {"clip_low": 0.1}, "clip_low"),
    ],
)
def test_settings_without_an_effect_are_refused(name: str, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LOSSES[name].bind(settings)


def test_a_loss_asks_for_what_its_settings_need() -> None:
    def needs(name: str, **settings: Any) -> tuple[Any, ...]:
        loss = LOSSES[name].bind(settings).loss
        return loss.inputs, set(loss.statistics), loss.only_advantage

    assert needs("ppo_clip") == (RolloutTokens, {"constant_entropy"}, True)
    assert needs("cispo", kl_coefficient=0.1) == (ReferencedRolloutTokens, {"constant_entropy"}, False)
    assert needs("reinforce", entropy_coefficient=0.1) == (RolloutTokens, {"entropy"}, False)
    assert needs("ppo") == (RolloutTokens, {"constant_entropy", "values"}, False)
    assert needs("value") == (ValueTokens, {"values"}, False)


# TRL 1.16, restated on its padded tensors: GRPOTrainer._compute_loss and RLOOTrainer.


def trl_per_token(
    level: str, logps: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor, **options: Any
) -> Tensor:
    log_ratio = logps - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None]
    coef_1 = torch.exp(log_ratio)
    kl = torch.exp(ref - logps) - (ref - logps) - 1
    kl = kl * coef_1 if options["bias_correction"] else kl
    if options.get("cispo"):
        loss = -torch.clamp(coef_1, max=options["cispo"]).detach() * advantages[:, None] * logps
    else:
        coef_2 = torch.clamp(coef_1, 1 - options["low"], 1 + options["high"])
        coef_1 = torch.clamp(coef_1, max=options["delta"]) if options.get("delta") else coef_1
        loss = -torch.min(coef_1 * advantages[:, None], coef_2 * advantages[:, None])
    return loss + options["beta"] * kl


PARITY = [
    ("ppo_clip", "token", {"low": 0.2, "high": 0.28, "delta": 1.5, "bias_correction": True, "beta": 0.04}),
    ("ppo_clip", "token", {"low": 0.1, "high": 0.1, "bias_correction": False, "beta": 0.1}),
    ("ppo_clip", "sequence", {"low": 0.01, "high": 0.02, "bias_correction": True, "beta": 0.04}),
    ("cispo", "token", {"cispo": 1.2, "bias_correction": True, "beta": 0.04}),
]


@pytest.mark.parametrize(("name", "level", "options"), PARITY)
def test_loss_and_gradient_are_those_of_trl(name: str, level: str, options: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 6, 3]
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    old, ref, moved = (-3 * torch.rand(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    logps = (old + 0.2 * moved + 0.3).requires_grad_()
    advantages = torch.randn(4, generator=generator, dtype=torch.float64)
    theirs = trl_per_token(level, logps, old, ref, advantages, mask, **options)
    scaled = ((theirs * mask).sum(-1) / mask.sum(-1)).mean()  # loss_type="grpo"
    (expected,) = torch.autograd.grad(scaled, logps)

    place_N = mask.nonzero()[:, 0]
    flat = logps.detach()[mask].requires_grad_()
    inputs = RolloutTokens(
        logprobs_N=flat,
        behaviour_N=old[mask],
        advantage_N=advantages[place_N],
        weight_N=1 / torch.tensor(lengths, dtype=torch.float64)[place_N],
        completion_N=place_N,
        completions=4,
        reference_N=ref[mask],
    )
    ours = {"kl_coefficient": options["beta"], "kl_importance": options["bias_correction"]}
    ours["ratio_level"] = "sequence_mean" if level == "sequence" else "token"
    if name == "cispo":
        ours["max_ratio"] = options["cispo"]
    else:
        ours |= {"clip_low": options["low"], "clip_high": options["high"], "dual_clip": options.get("delta")}
    loss = (inputs.weight * apply(name, inputs, **ours).loss).sum() / 4
    assert loss.item() == pytest.approx(scaled.item())
    (gradient,) = torch.autograd.grad(loss, flat)
    torch.testing.assert_close(gradient, expected[mask])


def test_rloo_is_that_of_trl() -> None:
    """exp(Σlogp − Σold), clipped, a mean over completions: weights 1/|y| and the denominator B."""
    logps = torch.tensor([-0.5, -1.0, -0.7], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-0.6, -1.1, -0.4], dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.5], dtype=torch.float64)
    ratio = torch.exp(torch.stack([logps[:2].sum() - old[:2].sum(), logps[2] - old[2]]))
    theirs = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    inputs = RolloutTokens(
        logprobs_N=logps,
        behaviour_N=old,
        advantage_N=advantages[[0, 0, 1]],
        weight_N=torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64),
        completion_N=torch.tensor([0, 0, 1]),
        completions=2,
    )
    ours = (inputs.weight * apply("ppo_clip", inputs, ratio_level="sequence_sum").loss).sum() / 2
    assert ours.item() == pytest.approx(theirs.item())
    for one, other in zip(torch.autograd.grad(ours, logps), torch.autograd.grad(theirs, logps), strict=True):
        torch.testing.assert_close(one, other)


# A world of 15 strings: 3 tokens, 0 ends, 3 at most; a policy is a table of logits by prefix.

PREFIXES = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
STRINGS = [
    string
    for length in (1, 2, 3)
    for string in itertools.product(range(3), repeat=length)
    if 0 not in string[:-1] and (string[-1] == 0 or length == 3)
]


class World:
    """Every string as rollouts of a policy that is on-policy, each weighted by its probability."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.table = torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()
        self.logp = torch.log_softmax(self.table, -1)
        self.reference = torch.log_softmax(torch.randn(7, 3, generator=generator, dtype=torch.float64), -1)
        self.scores = torch.randn(len(STRINGS), generator=generator, dtype=torch.float64)
        steps = [(PREFIXES.index(string[:at]), string[at]) for string in STRINGS for at in range(len(string))]
        self.states, self.tokens = map(torch.tensor, zip(*steps, strict=True))
        self.place = torch.tensor([place for place, string in enumerate(STRINGS) for _ in string])
        self.logprobs = self.logp[self.states, self.tokens]
        self.strings = torch.zeros(len(STRINGS), dtype=torch.float64).index_add(0, self.place, self.logprobs)
        self.entropy = -(self.logp.exp() * self.logp).sum(-1)
        self.kl = (self.logp.exp() * (self.logp - self.reference)).sum(-1)

    def visits(self) -> Tensor:
        """How probable it is to come by each prefix."""
        reach = torch.zeros(7, dtype=torch.float64)
        chance = self.strings.detach().exp()
        return reach.index_add(0, self.states, chance[self.place])

    def rollouts(self, *, share: bool) -> RolloutTokens:
        """Every token weighs its string's probability, or with `share` that over the string's length."""
        weight = self.strings.detach().exp()[self.place]
        lengths = torch.bincount(self.place)[self.place]
        noise = torch.linspace(-1, 1, len(self.place), dtype=torch.float64)
        return RolloutTokens(
            logprobs_N=self.logprobs,
            behaviour_N=self.logprobs.detach(),
            advantage_N=self.scores[self.place],
            weight_N=weight / lengths if share else weight,
            completion_N=self.place,
            completions=len(STRINGS),
            reference_N=self.reference[self.states, self.tokens],
            entropy_N=self.entropy[self.states],
            values_N=noise,
            old_values_N=noise,
            returns_N=-noise,
        )

    def gradient(self, total: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(total, self.table, retain_graph=True)
        return gradient


def test_the_strings_are_all_there_are() -> None:
    world = World()
    assert len(STRINGS) == 15
    assert world.strings.exp().sum().item() == pytest.approx(1.0)
    assert world.visits()[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "level"),
    [("reinforce", "token")]
    + [(name, level) for name in ("ppo_clip", "ppo", "cispo") for level in ("token", "sequence_mean", "sequence_sum")],
)
def test_on_policy_every_loss_has_the_exact_policy_gradient(name: str, level: str) -> None:
    """∇ Σ_y π(y)·r(y), all strings enumerated. A product of ratios has the string's gradient in each of its tokens;
    CISPO's is a constant weight, 1 on-policy."""
    world = World()
    settings = {} if name == "reinforce" else {"ratio_level": level}
    inputs = world.rollouts(share=level == "sequence_sum" and name != "cispo")
    loss = (inputs.weight * apply(name, inputs, **settings).loss).sum()
    expected = world.gradient((world.strings.exp() * world.scores).sum())
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(world.gradient(-loss), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_on_policy_every_estimator_has_the_exact_gradient_of_the_kl(name: str, estimator: str) -> None:
    """Σ over prefixes of how often they are met (a constant) · KL(π ‖ π_ref) of the next token."""
    world = World()
    inputs = replace(world.rollouts(share=False), advantage_N=torch.zeros_like(world.logprobs.detach()))
    loss = (inputs.weight * apply(name, inputs, kl_coefficient=0.7, kl_estimator=estimator).loss).sum()
    expected = world.gradient(0.7 * (world.visits() * world.kl).sum())
    torch.testing.assert_close(world.gradient(loss), expected)


def test_without_importance_k3_has_the_gradient_of_the_other_kl() -> None:
    """∇KL(π_ref ‖ π): what GRPO's first version minimised."""
    world = World()
    inputs = replace(world.rollouts(share=False), advantage_N=torch.zeros_like(world.logprobs.detach()))
    loss = (inputs.weight * apply("ppo_clip", inputs, kl_coefficient=1.0, kl_importance=False).loss).sum()
    forward = (world.reference.exp() * (world.reference - world.logp)).sum(-1)
    torch.testing.assert_close(world.gradient(loss), world.gradient((world.visits() * forward).sum()))


@pytest.mark.parametrize("name", NAMES)
def test_the_entropy_bonus_has_the_exact_gradient_of_the_entropy(name: str) -> None:
    world = World()
    inputs = replace(world.rollouts(share=False), advantage_N=torch.zeros_like(world.logprobs.detach()))
    loss = (inputs.weight * apply(name, inputs, entropy_coefficient=0.3).loss).sum()
    torch.testing.assert_close(world.gradient(-loss), world.gradient(0.3 * (world.visits() * world.entropy).sum()))
