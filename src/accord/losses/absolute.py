"""Losses that move chosen and rejected completions each against its own reference, not only apart from each other.

B = pairs. ĉ and r̂ are log-ratios of policy to reference, summed over completion tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from accord.losses.preference import PreferenceConfig, log_ratios, preference_loss, preference_output
from accord.losses.records import LOSSES, LossOutput, PreferenceLogprobs

__all__ = ["apo_down", "apo_zero", "bco_pair", "nca_pair", "sppo_hard"]


def nca_pair(inputs: PreferenceLogprobs, config: PreferenceConfig) -> LossOutput:
    """−log σ(βĉ) − ½·log σ(−βĉ) − ½·log σ(−βr̂): noise-contrastive alignment of two (Chen et al. 2024).

    Keeps the likelihood of the chosen completion from falling together with that of the rejected one.
    """
    chosen_B, rejected_B = (config.beta * ratio_B for ratio_B in log_ratios(inputs, config))
    loss_B = -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)
    return preference_output(inputs, config, loss_B)


def bco_pair(inputs: PreferenceLogprobs, config: PreferenceConfig) -> LossOutput:
    """−log σ(βĉ) − log σ(−βr̂): a classifier whose logit is the reward (Jung et al. 2024), without reward shift."""
    chosen_B, rejected_B = (config.beta * ratio_B for ratio_B in log_ratios(inputs, config))
    return preference_output(inputs, config, -F.logsigmoid(chosen_B) - F.logsigmoid(-rejected_B))


def sppo_hard(inputs: PreferenceLogprobs, config: PreferenceConfig) -> LossOutput:
    """(ĉ − 1/(2β))² + (r̂ + 1/(2β))²: self-play towards win rates of 1 and 0 (Wu et al. 2024, eq. 4.7, η = 1/β)."""
    chosen_B, rejected_B = log_ratios(inputs, config)
    target = 1 / (2 * config.beta)
    return preference_output(inputs, config, (chosen_B - target) ** 2 + (rejected_B + target) ** 2)


def apo_zero(inputs: PreferenceLogprobs, config: PreferenceConfig) -> LossOutput:
    """1 − σ(βĉ) + σ(βr̂): chosen up, rejected down (D'Oosterlinck et al. 2024, eq. 7).

    For chosen completions that are better than what the model says by itself.
    """
    chosen_B, rejected_B = (config.beta * ratio_B for ratio_B in log_ratios(inputs, config))
    return preference_output(inputs, config, torch.sigmoid(-chosen_B) + torch.sigmoid(rejected_B))


def apo_down(inputs: PreferenceLogprobs, config: PreferenceConfig) -> LossOutput:
    """σ(βĉ) + 1 − σ(βΔ): both down, the rejected one further (D'Oosterlinck et al. 2024, eq. 8).

    For a model that is better than even the chosen completions.
    """
    chosen_B, rejected_B = (config.beta * ratio_B for ratio_B in log_ratios(inputs, config))
    return preference_output(inputs, config, torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B))


LOSSES.add("nca_pair", preference_loss(nca_pair, PreferenceConfig))
LOSSES.add("bco_pair", preference_loss(bco_pair, PreferenceConfig))
LOSSES.add("sppo_hard", preference_loss(sppo_hard, PreferenceConfig))
LOSSES.add("apo_zero", preference_loss(apo_zero, PreferenceConfig))
LOSSES.add("apo_down", preference_loss(apo_down, PreferenceConfig))
