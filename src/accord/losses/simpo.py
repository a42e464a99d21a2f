"""Losses of the policy's own log-probabilities, without reference: SimPO (Meng et al. 2024) with the reward's shape of
AlphaPO (Gupta et al. 2025), and CPO (Xu et al. 2024).

B = pairs. Log-probabilities are averaged over completion tokens in `simpo`, summed in `cpo`.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from accord.losses.preference import PairConfig, noisy_logistic, pair_output
from accord.losses.records import LOSSES, Loss, LossOutput, PairLogprobs

__all__ = ["CPOConfig", "SimPOConfig", "cpo", "simpo"]

_LARGEST_EXPONENT = 40.0
"""Beyond this the reward of AlphaPO is constant: the loss is saturated, or hopeless, there."""


class SimPOConfig(PairConfig):
    """Settings of the SimPO loss."""

    beta: float = Field(2.0, gt=0)
    """Scale of the reward, which is β times the mean log-probability per token."""
    gamma: float = Field(1.0, ge=0)
    """By how much the chosen completion's reward should win."""
    alpha: float = Field(0.0, allow_inf_nan=False)
    """Shape of the reward (AlphaPO): above 0, unlikely completions are told apart more than likely ones; 0: SimPO's."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a preference is recorded the wrong way round."""


def simpo(inputs: PairLogprobs, config: SimPOConfig) -> LossOutput:
    """−log σ(β·s(c/|c|) − β·s(r/|r|) − γ), s(x) = (1 − e^(−αx))/α, which is x at α = 0 (SimPO's eq. 6).

    TRL adds an SFT term of weight 1 by default; the papers have none.
    """
    chosen_B = config.beta * _shaped(inputs.chosen_B / inputs.chosen_length_B, config.alpha)
    rejected_B = config.beta * _shaped(inputs.rejected_B / inputs.rejected_length_B, config.alpha)
    loss_B = noisy_logistic(chosen_B - rejected_B - config.gamma, config.label_smoothing)
    return pair_output(inputs, config, loss_B, chosen_B, rejected_B)


def _shaped(mean_B: Tensor, alpha: float) -> Tensor:
    """(1 − p^(−α))/α of a mean log-probability log p (Gupta et al. 2025)."""
    return -torch.expm1((-alpha * mean_B).clamp(max=_LARGEST_EXPONENT)) / alpha if alpha else mean_B


class CPOConfig(PairConfig):
    """Settings of the CPO loss."""

    beta: float = Field(0.1, gt=0)
    """Scale of the reward, which is β times the log-probability."""
    sft_weight: float = Field(1.0, ge=0)
    """Weight of the SFT term, which keeps the policy near the chosen completions; 1 in the paper."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a preference is recorded the wrong way round."""


def cpo(inputs: PairLogprobs, config: CPOConfig) -> LossOutput:
    """−log σ(β(c − r)) − c/|c|: DPO with a uniform reference, and an SFT term (eq. 3)."""
    chosen_B, rejected_B = config.beta * inputs.chosen_B, config.beta * inputs.rejected_B
    loss_B = noisy_logistic(chosen_B - rejected_B, config.label_smoothing)
    return pair_output(inputs, config, loss_B, chosen_B, rejected_B)


LOSSES.add("simpo", Loss(simpo, SimPOConfig, PairLogprobs))
LOSSES.add("cpo", Loss(cpo, CPOConfig, PairLogprobs))
