"""Losses of the reward difference other than DPO's logistic one: hinge, IPO, EXO, DiscoPOP.

B = pairs. Δ is the difference of log-ratios, summed over completion tokens, except in `ipo`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field

from accord.losses.divergences import DivergenceConfig, scores
from accord.losses.preference import preference_loss, preference_output
from accord.losses.records import LOSSES, LossOutput, PreferenceLogprobs

__all__ = ["DiscoPOPConfig", "EXOConfig", "HingeConfig", "IPOConfig", "discopop", "exo_pair", "hinge", "ipo"]


class HingeConfig(DivergenceConfig):
    """Settings of the hinge loss."""


def hinge(inputs: PreferenceLogprobs, config: HingeConfig) -> LossOutput:
    """max(0, 1 − βΔ): a pair is left alone once it is right by 1/β (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023)."""
    chosen_B, rejected_B = scores(inputs, config)
    return preference_output(inputs, config, torch.relu(1 - config.beta * (chosen_B - rejected_B)))


class IPOConfig(DivergenceConfig):
    """Settings of the IPO loss."""

    beta: float = Field(0.1, gt=0)
    """The paper's τ: the log-ratios are driven to differ by 1/(2β) per token and no further."""


def ipo(inputs: PreferenceLogprobs, config: IPOConfig) -> LossOutput:
    """(ĉ/|c| − r̂/|r| − 1/(2β))²: regression to a finite margin (Azar et al. 2023, eq. 17).

    The paper writes sums; its experiments average over tokens (its authors to TRL), as does this.
    """
    chosen_B, rejected_B = scores(inputs, config)
    margin_B = chosen_B / inputs.chosen_length_B - rejected_B / inputs.rejected_length_B
    return preference_output(inputs, config, (margin_B - 1 / (2 * config.beta)) ** 2)


class EXOConfig(DivergenceConfig):
    """Settings of the EXO loss."""

    label_smoothing: float = Field(1e-3, gt=0, lt=0.5)
    """The probability that a preference is recorded the wrong way round; at 0 the loss is infinite."""


def exo_pair(inputs: PreferenceLogprobs, config: EXOConfig) -> LossOutput:
    """KL of [σ(βΔ), σ(−βΔ)] to [1−ε, ε]: the reverse KL where DPO has the forward one (Ji et al. 2024, eq. 16)."""
    chosen_B, rejected_B = scores(inputs, config)
    margin_B, noise = config.beta * (chosen_B - rejected_B), config.label_smoothing
    right_B = torch.sigmoid(margin_B) * (F.logsigmoid(margin_B) - math.log1p(-noise))
    wrong_B = torch.sigmoid(-margin_B) * (F.logsigmoid(-margin_B) - math.log(noise))
    return preference_output(inputs, config, right_B + wrong_B)


class DiscoPOPConfig(DivergenceConfig):
    """Settings of the DiscoPOP loss."""

    tau: float = Field(0.05, gt=0, le=1)
    """Temperature of the blend between the logistic and the exponential loss."""


def discopop(inputs: PreferenceLogprobs, config: DiscoPOPConfig) -> LossOutput:
    """(1−m)·(−log σ(βΔ)) + m·e^(−βΔ), m = σ(βΔ/τ): a loss found by a language model (Lu et al. 2024, eq. 5).

    Not monotone: with the default τ it rises with Δ around Δ = 0, where training starts.
    """
    chosen_B, rejected_B = scores(inputs, config)
    margin_B = config.beta * (chosen_B - rejected_B)
    logistic_B = -torch.sigmoid(-margin_B / config.tau) * F.logsigmoid(margin_B)
    # m·e^(−x) as one exponential: where e^(−x) alone overflows, m is smaller still.
    exponential_B = torch.exp(F.logsigmoid(margin_B / config.tau) - margin_B)
    return preference_output(inputs, config, logistic_B + exponential_B)


LOSSES.add("hinge", preference_loss(hinge, HingeConfig))
LOSSES.add("ipo", preference_loss(ipo, IPOConfig))
LOSSES.add("exo_pair", preference_loss(exo_pair, EXOConfig))
LOSSES.add("discopop", preference_loss(discopop, DiscoPOPConfig))
