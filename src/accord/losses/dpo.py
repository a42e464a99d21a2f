"""DPO: direct preference optimisation (Rafailov et al. 2023, eq. 7), for noisy labels and for mean log-ratios too.

B = pairs. Log-probabilities are summed over completion tokens, except in `sigmoid_norm`.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field

from accord.losses.divergences import DivergenceConfig, scores
from accord.losses.preference import noisy_logistic, preference_loss, preference_output
from accord.losses.records import LOSSES, LossOutput, PreferenceLogprobs

__all__ = ["DPOConfig", "RobustConfig", "SigmoidNormConfig", "dpo", "robust", "sigmoid_norm"]


class DPOConfig(DivergenceConfig):
    """Settings of the DPO loss."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a preference is recorded the wrong way round."""


def dpo(inputs: PreferenceLogprobs, config: DPOConfig) -> LossOutput:
    """−(1−ε)·log σ(βΔ) − ε·log σ(−βΔ). With ε = `label_smoothing` this is cDPO (Mitchell 2023)."""
    chosen_B, rejected_B = scores(inputs, config)
    return preference_output(
        inputs, config, noisy_logistic(config.beta * (chosen_B - rejected_B), config.label_smoothing)
    )


class RobustConfig(DivergenceConfig):
    """Settings of robust DPO."""

    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    """The probability that a preference is recorded the wrong way round."""


def robust(inputs: PreferenceLogprobs, config: RobustConfig) -> LossOutput:
    """[−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1−2ε): unbiased where labels are flipped (Chowdhury et al. 2024).

    Its mean over flipped and unflipped labels is DPO's loss of the true labels. Not bounded below in a single row.
    """
    chosen_B, rejected_B = scores(inputs, config)
    margin_B, noise = config.beta * (chosen_B - rejected_B), config.label_smoothing
    loss_B = (-(1 - noise) * F.logsigmoid(margin_B) + noise * F.logsigmoid(-margin_B)) / (1 - 2 * noise)
    return preference_output(inputs, config, loss_B)


class SigmoidNormConfig(DivergenceConfig):
    """Settings of length-normalised DPO."""

    beta: float = Field(5.0, gt=0)
    """As in DPO, of mean log-ratios per token: these are smaller by the length, so β is larger."""


def sigmoid_norm(inputs: PreferenceLogprobs, config: SigmoidNormConfig) -> LossOutput:
    """−log σ(β(ĉ/|c| − r̂/|r|)): DPO of mean log-ratios per token (Lambert et al. 2024, Tülu 3)."""
    chosen_B, rejected_B = scores(inputs, config)
    margin_B = chosen_B / inputs.chosen_length_B - rejected_B / inputs.rejected_length_B
    return preference_output(inputs, config, -F.logsigmoid(config.beta * margin_B))


LOSSES.add("dpo", preference_loss(dpo, DPOConfig))
LOSSES.add("robust", preference_loss(robust, RobustConfig))
LOSSES.add("sigmoid_norm", preference_loss(sigmoid_norm, SigmoidNormConfig))
