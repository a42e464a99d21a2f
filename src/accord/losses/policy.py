"""Losses of sampled completions: clipped ratios (PPO, GRPO, DAPO, GSPO, RLOO), CISPO and REINFORCE.

N = tokens. ρ = π/μ is the ratio of the policy to the one that sampled, A the advantage. How a step averages over tokens
and completions is no part of a loss: it stands in the tokens' weights (`accord.advantages.token_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from accord.config import Config
from accord.losses.records import LOSSES, Loss, LossOutput, ReferencedRolloutTokens, RolloutTokens

__all__ = [
    "CISPOConfig",
    "PPOClipConfig",
    "PolicyConfig",
    "RatioConfig",
    "cispo",
    "policy_loss",
    "ppo_clip",
    "reinforce",
]

_LARGEST_EXPONENT = 40.0
"""The square of e^44 overflows float32, and an infinite ratio has no gradient even where it is clipped."""

C = TypeVar("C", bound="PolicyConfig")


class PolicyConfig(Config):
    """Settings of every loss of sampled completions."""

    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the KL to the reference in the loss; 0: no reference is computed for it."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log π_ref − log π of the token: −d, d²/2, or e^d − d − 1 (Schulman 2020)."""
    kl_importance: bool = True
    """Weigh the estimate by the unclipped ratio: its gradient is then that of KL(π ‖ π_ref), also off-policy. Without
    it `k3` gives the gradient of KL(π_ref ‖ π), as in the first GRPO (TRL's `use_bias_correction_kl`)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy of the token's whole distribution, which the loss then rewards."""

    @model_validator(mode="after")
    def _kl_where_it_counts(self) -> Self:
        if self.kl_coefficient == 0 and (self.kl_estimator != "k3" or not self.kl_importance):
            raise ValueError("kl_estimator and kl_importance have no effect while kl_coefficient is 0")
        if self.kl_estimator == "k1" and not self.kl_importance:
            raise ValueError('kl_estimator = "k1" needs kl_importance: the mean gradient of log π alone is zero')
        return self


class RatioConfig(PolicyConfig):
    """Settings of the losses with a ratio."""

    ratio_level: Literal["token", "sequence_mean", "sequence_sum"] = "token"
    """The ratio of each token, or one for all tokens of a completion: its tokens' geometric mean (GSPO, Zheng et al.
    2025, eq. 7), or their product (RLOO, Ahmadian et al. 2024)."""


class PPOClipConfig(RatioConfig):
    """Settings of the clipped policy loss."""

    clip_low: float = Field(0.2, gt=0, lt=1)
    """Below 1 − this the ratio of a bad token has no gradient."""
    clip_high: float = Field(0.2, gt=0)
    """Above 1 + this the ratio of a good token has no gradient; larger than `clip_low`: DAPO's clip-higher."""
    dual_clip: float | None = Field(None, gt=1)
    """Above this the ratio of a bad token has no gradient, either (Ye et al. 2020; TRL's `delta`)."""

    @model_validator(mode="after")
    def _dual_clip_is_beyond(self) -> Self:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError("dual_clip must be above 1 + clip_high")
        return self


class CISPOConfig(RatioConfig):
    """Settings of CISPO."""

    max_ratio: float = Field(5.0, gt=1)
    """Larger ratios weigh as this one does; TRL's `epsilon_high`."""


def ppo_clip(inputs: RolloutTokens, config: PPOClipConfig) -> LossOutput:
    """−min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A) (Schulman et al. 2017, eq. 7)."""
    ratio_N, advantage_N = _ratio(inputs, config.ratio_level), inputs.advantage_N
    low, high = 1 - config.clip_low, 1 + config.clip_high
    capped_N = ratio_N if config.dual_clip is None else ratio_N.clamp(max=config.dual_clip)
    loss_N = -torch.minimum(capped_N * advantage_N, ratio_N.clamp(low, high) * advantage_N)
    below_N = (ratio_N < low) & (advantage_N < 0)
    above_N = (ratio_N > high) & (advantage_N > 0)
    metrics = {
        "clip_ratio/low_mean": below_N.float(),
        "clip_ratio/high_mean": above_N.float(),
        "clip_ratio/region_mean": (below_N | above_N).float(),
    }
    if config.dual_clip is not None:
        metrics["clip_ratio/dual_mean"] = ((ratio_N > config.dual_clip) & (advantage_N < 0)).float()
    return _output(inputs, config, loss_N, ratio_N, metrics)


def cispo(inputs: RolloutTokens, config: CISPOConfig) -> LossOutput:
    """−sg(min(ρ, max_ratio))·A·log π: no token loses its gradient (MiniMax 2025, eq. 4–5)."""
    ratio_N = _ratio(inputs, config.ratio_level)
    loss_N = -ratio_N.detach().clamp(max=config.max_ratio) * inputs.advantage_N * inputs.logprobs_N
    clipped_N = (ratio_N > config.max_ratio) & (inputs.advantage_N > 0)
    return _output(inputs, config, loss_N, ratio_N, {"cispo_clip_ratio": clipped_N.float()})


def reinforce(inputs: RolloutTokens, config: PolicyConfig) -> LossOutput:
    """−A·log π (Williams 1992): without a ratio, so for one step on what the policy itself has just sampled."""
    return _output(inputs, config, -inputs.advantage_N * inputs.logprobs_N, _ratio(inputs, "token"), {})


def policy_loss(function: Callable[[RolloutTokens, C], LossOutput], config: type[C], **needs: bool) -> Loss:
    """The registry row of such a loss: it reads the reference, and the entropy with its gradient, only at a weight."""
    row = Loss(function, config, RolloutTokens, derive=_spread)
    values = frozenset({"values"}) if needs.get("values") else frozenset[str]()

    def specialise(settings: C) -> Loss:
        entropy = "entropy" if settings.entropy_coefficient else "constant_entropy"
        return replace(
            row,
            inputs=ReferencedRolloutTokens if settings.kl_coefficient else RolloutTokens,
            statistics=values | {entropy},
            only_advantage=not (values or settings.kl_coefficient or settings.entropy_coefficient),
        )

    return replace(row, specialise=specialise)


def _ratio(inputs: RolloutTokens, level: str) -> Tensor:
    """π/μ of every token, or of its completion: [N]."""
    change_N = inputs.logprobs_N - inputs.behaviour_N
    if level != "token":
        place_N, zero_C = inputs.completion_N, change_N.new_zeros(inputs.completions)
        change_C = zero_C.index_add(0, place_N, change_N)
        if level == "sequence_mean":
            change_C = change_C / zero_C.index_add(0, place_N, torch.ones_like(change_N)).clamp(min=1)
        change_N = change_C[place_N]
    return change_N.clamp(max=_LARGEST_EXPONENT).exp()


def _output(
    inputs: RolloutTokens, config: PolicyConfig, loss_N: Tensor, ratio_N: Tensor, metrics: Mapping[str, Tensor]
) -> LossOutput:
    """The end of every policy loss: KL, entropy, and metrics of how far the policy has moved since it sampled."""
    change_N = inputs.logprobs_N - inputs.behaviour_N
    seen = {
        **metrics,
        "policy/approxkl_avg": 0.5 * change_N**2,
        "val/ratio": ratio_N,
        "val/ratio_squared": ratio_N**2,
    }
    if config.kl_coefficient:
        kl_N = _kl(inputs, config.kl_estimator)
        if config.kl_importance:  # the square's own gradient is that of the KL already: its weight is a constant
            kl_N = kl_N * (ratio_N.detach() if config.kl_estimator == "k2" else ratio_N)
        loss_N = loss_N + config.kl_coefficient * kl_N
        seen["kl"] = kl_N
    if inputs.entropy_N is not None:
        seen["entropy"] = inputs.entropy_N
    if config.entropy_coefficient:
        if inputs.entropy_N is None:
            raise ValueError("An entropy bonus needs the statistic entropy: bind the loss with Loss.bind.")
        loss_N = loss_N - config.entropy_coefficient * inputs.entropy_N
    return LossOutput(loss_N, seen)


def _kl(inputs: RolloutTokens, estimator: str) -> Tensor:
    if inputs.reference_N is None:
        raise ValueError("A KL needs log-probabilities of the reference: bind the loss with Loss.bind.")
    excess_N = (inputs.reference_N - inputs.logprobs_N).clamp(max=_LARGEST_EXPONENT)
    if estimator == "k3":
        return torch.expm1(excess_N) - excess_N
    return -excess_N if estimator == "k1" else 0.5 * excess_N**2


def _spread(means: Mapping[str, float]) -> dict[str, float]:
    """The variance of the ratio, and the share of the tokens that still counts: (Σρ)²/(N·Σρ²) (Kish 1965)."""
    mean, squared = means["val/ratio"], means["val/ratio_squared"]
    return {"val/ratio_var": max(0.0, squared - mean**2), "effective_sample_size": mean**2 / squared}


LOSSES.add("ppo_clip", policy_loss(ppo_clip, PPOClipConfig))
LOSSES.add("cispo", policy_loss(cispo, CISPOConfig))
LOSSES.add("reinforce", policy_loss(reinforce, PolicyConfig))
