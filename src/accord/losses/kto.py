"""KTO: learning from thumbs up and down without pairs (Ethayarajh et al. 2024, eq. 7 and §4.1), and unpaired APO-zero.

B = labelled completions. Log-probabilities are summed over completion tokens.
"""

from __future__ import annotations

import torch

from accord.losses.labels import LabelConfig, label_metrics, margin, signs
from accord.losses.records import LOSSES, ControlledLogprobs, LabelledLogprobs, Loss, LossOutput

__all__ = ["apo_zero_unpaired", "kto"]


def kto(inputs: ControlledLogprobs, config: LabelConfig) -> LossOutput:
    """λ·(1 − σ(±β(log π/π_ref − z))), + and λ = desirable_weight for a thumb up, − and undesirable_weight for one down.

    z = max(0, mean log π/π_ref of completions of other prompts) estimates the KL between policy and reference. It is a
    constant of the whole step: no gradient flows through it.
    """
    sign_B, weight_B = signs(inputs, config)
    kl = inputs.control.detach().clamp(min=0)
    loss_B = weight_B * torch.sigmoid(-sign_B * config.beta * (inputs.policy_B - inputs.ref_B - kl))
    return LossOutput(loss_B, {**label_metrics(inputs, config), "kl": kl.expand_as(loss_B)})


def apo_zero_unpaired(inputs: LabelledLogprobs, config: LabelConfig) -> LossOutput:
    """λ·(1 − σ(±β·log π/π_ref)): KTO with z = 0 (D'Oosterlinck et al. 2024, APO-zero of single completions).

    For good completions that are better than what the model says by itself.
    """
    sign_B, weight_B = signs(inputs, config)
    loss_B = weight_B * torch.sigmoid(-sign_B * config.beta * (inputs.policy_B - inputs.ref_B))
    return LossOutput(loss_B, label_metrics(inputs, config))


LOSSES.add("kto", Loss(kto, LabelConfig, ControlledLogprobs, derive=margin))
LOSSES.add("apo_zero_unpaired", Loss(apo_zero_unpaired, LabelConfig, LabelledLogprobs, derive=margin))
