"""ORPO: odds-ratio preference optimisation (Hong et al. 2024, eq. 4–7): SFT and preference in one, no reference.

B = pairs. Log-probabilities are averaged over completion tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from accord.losses.preference import PairConfig, pair_output
from accord.losses.records import LOSSES, Loss, LossOutput, PairLogprobs

__all__ = ["ORPOConfig", "orpo"]

_CERTAIN = -1e-6
"""Odds are infinite at a probability of 1: closer to it than this they count as here."""


class ORPOConfig(PairConfig):
    """Settings of the ORPO loss."""

    beta: float = Field(0.1, gt=0)
    """The paper's λ: weight of the odds-ratio term."""
    sft_weight: float = Field(1.0, ge=0)
    """Weight of the SFT term; 1 in the paper."""


def orpo(inputs: PairLogprobs, config: ORPOConfig) -> LossOutput:
    """−c̄ − λ·log σ(log odds(c̄) − log odds(r̄)), log odds(ℓ) = ℓ − log(1 − e^ℓ), c̄ and r̄ means over tokens.

    The SFT term is over the response and every pair counts the same, as in the paper. TRL's counts the prompt's tokens
    too, and longer completions more.
    """
    chosen_B = inputs.chosen_B / inputs.chosen_length_B
    rejected_B = inputs.rejected_B / inputs.rejected_length_B
    log_odds_B = _log_odds(chosen_B) - _log_odds(rejected_B)
    loss_B = -config.beta * F.logsigmoid(log_odds_B)
    output = pair_output(inputs, config, loss_B, config.beta * chosen_B, config.beta * rejected_B)
    return LossOutput(output.loss, {**output.metrics, "log_odds": log_odds_B})


def _log_odds(logprob_B: Tensor) -> Tensor:
    logprob_B = logprob_B.clamp(max=_CERTAIN)
    # log(1 − e^x) in the form that keeps its digits: Mächler 2012.
    near_B = torch.log(-torch.expm1(logprob_B.clamp(min=-math.log(2))))
    far_B = torch.log1p(-torch.exp(logprob_B.clamp(max=-math.log(2))))
    return logprob_B - torch.where(logprob_B > -math.log(2), near_B, far_B)


LOSSES.add("orpo", Loss(orpo, ORPOConfig, PairLogprobs))
