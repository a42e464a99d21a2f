"""What the losses of pairs share: settings, log-ratios, noisy labels, and how a loss ends.

B = pairs. c and r are the log-probabilities of the chosen and the rejected completion, summed over their tokens;
ĉ = c − c_ref and r̂ = r − r_ref are log-ratios of policy to reference, Δ = ĉ − r̂.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from accord.config import Config
from accord.losses.records import Loss, LossOutput, PairLogprobs, PreferenceLogprobs

__all__ = [
    "PairConfig",
    "PreferenceConfig",
    "log_ratios",
    "noisy_logistic",
    "pair_output",
    "preference_loss",
    "preference_output",
]


C = TypeVar("C", bound="PreferenceConfig")


class PairConfig(Config):
    """Settings of every loss of pairs."""

    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference: the KL coefficient of the problem that DPO solves."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of an SFT term: the chosen completion's mean negative log-likelihood per token (Pang et al. 2024)."""


class PreferenceConfig(PairConfig):
    """Settings of the losses that compare each completion with its reference."""

    ld_alpha: float = Field(1.0, ge=0, le=1)
    """Weight of tokens beyond the shorter completion's length (LD-DPO, Liu et al. 2024): below 1, length wins less."""
    wpo: bool = False
    """Weight each pair by how likely the policy is to say it (WPO, Zhou et al. 2024): off-policy pairs count less."""


def log_ratios(inputs: PreferenceLogprobs, config: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """ĉ and r̂ [B] in nats. With `ld_alpha`, tokens beyond the shorter completion's length count that much."""
    chosen_B, rejected_B = inputs.chosen_B - inputs.ref_chosen_B, inputs.rejected_B - inputs.ref_rejected_B
    if config.ld_alpha < 1:
        chosen_B = chosen_B - (1 - config.ld_alpha) * inputs.chosen_tail_B
        rejected_B = rejected_B - (1 - config.ld_alpha) * inputs.rejected_tail_B
    return chosen_B, rejected_B


def noisy_logistic(margin_B: Tensor, noise: float) -> Tensor:
    """−(1−ε)·log σ(m) − ε·log σ(−m): the logistic loss where a label is wrong with probability ε (Mitchell 2023)."""
    return -(1 - noise) * F.logsigmoid(margin_B) - noise * F.logsigmoid(-margin_B)


def preference_output(inputs: PreferenceLogprobs, config: PreferenceConfig, loss_B: Tensor) -> LossOutput:
    """The end of a loss with a reference: WPO's weights, then `pair_output`. Rewards are β times the log-ratios."""
    chosen_B, rejected_B = log_ratios(inputs, config)
    if config.wpo:
        loss_B = loss_B * _on_policy(inputs)
    return pair_output(inputs, config, loss_B, config.beta * chosen_B, config.beta * rejected_B)


def pair_output(
    inputs: PairLogprobs, config: PairConfig, loss_B: Tensor, chosen_B: Tensor, rejected_B: Tensor
) -> LossOutput:
    """The end of every loss of pairs: the SFT term, and metrics from the rewards `chosen_B` and `rejected_B`."""
    nll_B = -inputs.chosen_B / inputs.chosen_length_B
    metrics = {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/accuracies": (chosen_B > rejected_B).float(),
        "rewards/margins": chosen_B - rejected_B,
        "logps/chosen": inputs.chosen_B,
        "logps/rejected": inputs.rejected_B,
    }
    if config.sft_weight:
        loss_B = loss_B + config.sft_weight * nll_B
        metrics["nll"] = nll_B
    return LossOutput(loss_B, metrics)


def preference_loss(function: Callable[[PreferenceLogprobs, C], LossOutput], config: type[C]) -> Loss:
    """The registry row of a loss that ends with `preference_output`: WPO's weights need a statistic of the head."""
    row = Loss(function, config, PreferenceLogprobs)
    weighted = replace(row, statistics=frozenset({"log_sum_squares"}))
    return replace(row, specialise=lambda settings: weighted if settings.wpo else row)


def _on_policy(inputs: PreferenceLogprobs) -> Tensor:
    """w(x, c)·w(x, r), w = exp(mean over tokens of log p(token) − log Σ_v p(v)²), a constant (Zhou et al. 2024).

    The denominator is the expected probability of a token that the policy samples: on-policy text has w ≈ 1.
    """
    if inputs.chosen_log_sum_squares_B is None or inputs.rejected_log_sum_squares_B is None:
        raise ValueError("WPO needs the statistic log_sum_squares: bind the loss with Loss.bind.")
    chosen_B = (inputs.chosen_B - inputs.chosen_log_sum_squares_B) / inputs.chosen_length_B
    rejected_B = (inputs.rejected_B - inputs.rejected_log_sum_squares_B) / inputs.rejected_length_B
    return torch.exp(chosen_B + rejected_B).detach()
