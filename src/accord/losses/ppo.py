"""PPO with a critic (Schulman et al. 2017): the clipped policy loss and the clipped value loss, together or apart.

N = tokens. V is the value of the state before a token, R the return that it should have been.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from accord.config import Config
from accord.losses.policy import PPOClipConfig, policy_loss, ppo_clip
from accord.losses.records import LOSSES, Loss, LossOutput, RolloutTokens, ValueTokens

__all__ = ["PPOConfig", "ValueConfig", "ppo", "value"]


class PPOConfig(PPOClipConfig):
    """Settings of PPO whose values come from a head of the policy."""

    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the value loss."""
    value_clip: float = Field(0.2, ge=0)
    """How far a value may move from what it was when sampled before its gradient ends; 0: any distance."""


class ValueConfig(Config):
    """Settings of the value loss of a separate critic."""

    value_clip: float = Field(0.2, ge=0)
    """How far a value may move from what it was when sampled before its gradient ends; 0: any distance."""


def ppo(inputs: RolloutTokens, config: PPOConfig) -> LossOutput:
    """The loss of `ppo_clip` + value_coefficient · the loss of `value` (Schulman et al. 2017, eq. 9)."""
    if inputs.values_N is None or inputs.old_values_N is None or inputs.returns_N is None:
        raise ValueError("PPO needs the statistic values, and branches that carry value_L and return_L.")
    policy = ppo_clip(inputs, config)
    loss_N, metrics = _value_loss(inputs.values_N, inputs.old_values_N, inputs.returns_N, config.value_clip)
    metrics |= {"loss/policy_avg": policy.loss, "loss/value_avg": loss_N}
    return LossOutput(policy.loss + config.value_coefficient * loss_N, {**policy.metrics, **metrics})


def value(inputs: ValueTokens, config: ValueConfig) -> LossOutput:
    """½·max((V − R)², (V_old + clip(V − V_old, ±value_clip) − R)²) (Huang et al. 2022, "The 37 details", detail 9)."""
    loss_N, metrics = _value_loss(inputs.values_N, inputs.old_values_N, inputs.returns_N, config.value_clip)
    return LossOutput(loss_N, metrics)


def _value_loss(value_N: Tensor, old_N: Tensor, return_N: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    error_N = (value_N - return_N) ** 2
    metrics = {"val/mean": value_N, "val/error": error_N}
    if clip:
        clipped_N = (old_N + (value_N - old_N).clamp(-clip, clip) - return_N) ** 2
        metrics["val/clipfrac_avg"] = (clipped_N > error_N).float()
        error_N = torch.maximum(error_N, clipped_N)
    return 0.5 * error_N, metrics


LOSSES.add("ppo", policy_loss(ppo, PPOConfig, values=True))
LOSSES.add("value", Loss(value, ValueConfig, ValueTokens, statistics=frozenset({"values"})))
