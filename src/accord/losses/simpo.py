"""Losses of the policy's own log-probabilities, without reference: SimPO (Meng et al. 2024) and CPO (Xu et al. 2024).

B = pairs. Log-probabilities are averaged over completion tokens in `simpo`, summed in `cpo`.
"""

from __future__ import annotations

from pydantic import Field

from accord.losses.preference import PairConfig, noisy_logistic, pair_output
from accord.losses.records import LOSSES, Loss, LossOutput, PairLogprobs

__all__ = ["CPOConfig", "SimPOConfig", "cpo", "simpo"]


class SimPOConfig(PairConfig):
    """Settings of the SimPO loss."""

    beta: float = Field(2.0, gt=0)
    """Scale of the reward, which is β times the mean log-probability per token."""
    gamma: float = Field(1.0, ge=0)
    """By how much the chosen completion's reward should win."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a preference is recorded the wrong way round."""


def simpo(inputs: PairLogprobs, config: SimPOConfig) -> LossOutput:
    """−log σ(β·c/|c| − β·r/|r| − γ) (eq. 6). TRL adds an SFT term of weight 1 by default; the paper has none."""
    chosen_B = config.beta * inputs.chosen_B / inputs.chosen_length_B
    rejected_B = config.beta * inputs.rejected_B / inputs.rejected_length_B
    loss_B = noisy_logistic(chosen_B - rejected_B - config.gamma, config.label_smoothing)
    return pair_output(inputs, config, loss_B, chosen_B, rejected_B)


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
