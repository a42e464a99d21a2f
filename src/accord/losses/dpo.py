"""DPO: direct preference optimisation (Rafailov et al. 2023, eq. 7), with label smoothing as cDPO (Mitchell 2023).

B = pairs. Log-probabilities are summed over completion tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field

from accord.config import Config
from accord.losses.records import LOSSES, Loss, LossOutput, PreferenceLogprobs

__all__ = ["DPOConfig", "dpo"]


class DPOConfig(Config):
    """Settings of the DPO loss."""

    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference: the KL coefficient of the problem that DPO solves."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a preference is recorded the wrong way round."""


def dpo(inputs: PreferenceLogprobs, config: DPOConfig) -> LossOutput:
    """−(1−ε)·log σ(βΔ) − ε·log σ(−βΔ), Δ = (c − c_ref) − (r − r_ref)."""
    chosen_B = config.beta * (inputs.chosen_B - inputs.ref_chosen_B)
    rejected_B = config.beta * (inputs.rejected_B - inputs.ref_rejected_B)
    margin_B = chosen_B - rejected_B
    loss_B = -(1 - config.label_smoothing) * F.logsigmoid(margin_B) - config.label_smoothing * F.logsigmoid(-margin_B)
    metrics = {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/accuracies": (chosen_B > rejected_B).float(),
        "rewards/margins": margin_B,
        "logps/chosen": inputs.chosen_B,
        "logps/rejected": inputs.rejected_B,
    }
    return LossOutput(loss_B, metrics)


LOSSES.add("dpo", Loss(dpo, DPOConfig, PreferenceLogprobs))
