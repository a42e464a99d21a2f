"""BCO: binary classifier optimisation, thumbs up and down as the classes of a classifier (Jung et al. 2024).

B = labelled completions. Log-probabilities are summed over completion tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accord.losses.labels import LabelConfig, label_metrics, margin, signs
from accord.losses.records import LOSSES, LabelledLogprobs, Loss, LossOutput

__all__ = ["bco"]


def bco(inputs: LabelledLogprobs, config: LabelConfig) -> LossOutput:
    """−λ·log σ(±(r − δ)), r = β·log π/π_ref, + for a thumb up, − for a thumb down.

    δ = ½(mean r of the good + mean r of the bad), the paper's reward shift, over the completions of this step and
    without gradient; a step with one label only has that label's mean. TRL's δ (until it dropped BCO) was the running
    mean of all rewards since the start: that lags behind the policy, leans to the commoner label, and is one more thing
    to save. The paper's weighting of prompts by density ratio is not done.
    """
    sign_B, weight_B = signs(inputs, config)
    reward_B = config.beta * (inputs.policy_B - inputs.ref_B)
    delta = _shift(reward_B.detach(), inputs.good_B)
    loss_B = -weight_B * F.logsigmoid(sign_B * (reward_B - delta))
    return LossOutput(loss_B, {**label_metrics(inputs, config), "delta": delta.expand_as(loss_B)})


def _shift(reward_B: Tensor, good_B: Tensor) -> Tensor:
    means = torch.stack([reward_B.masked_fill(~rows, torch.nan).nanmean() for rows in (good_B, ~good_B)])
    return means.nanmean()


LOSSES.add("bco", Loss(bco, LabelConfig, LabelledLogprobs, couples_rows=True, derive=margin))
