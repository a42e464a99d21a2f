"""Bradley–Terry: the loss of reward models (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1; Touvron et al. 2023).

B = pairs. A ranking of K completions gives all its C(K, 2) pairs, each with weight 1 / C(K, 2).
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field

from accord.config import Config
from accord.losses.records import LOSSES, Loss, LossOutput, PairScores

__all__ = ["BradleyTerryConfig", "bradley_terry"]


class BradleyTerryConfig(Config):
    """Settings of the reward-model loss."""

    centre: float = Field(0.0, ge=0)
    """Weight of (r_chosen + r_rejected)², which pulls scores to a mean of zero (Eisenstein et al. 2023)."""


def bradley_terry(inputs: PairScores, config: BradleyTerryConfig) -> LossOutput:
    """−q·log σ(Δ − m) − (1 − q)·log σ(m − Δ) + centre · (r_chosen + r_rejected)², Δ = r_chosen − r_rejected.

    m is the margin, q the probability that chosen is better: 1 unless the data says otherwise.
    """
    difference_B = inputs.chosen_B - inputs.rejected_B
    excess_B, q_B = difference_B - inputs.margin_B, inputs.probability_B
    # −log σ(−x) = x − log σ(x), so both terms need one log σ.
    loss_B = (1 - q_B) * excess_B - F.logsigmoid(excess_B)
    if config.centre:
        loss_B = loss_B + config.centre * (inputs.chosen_B + inputs.rejected_B) ** 2
    metrics = {
        "accuracy": (difference_B > 0).float() + 0.5 * (difference_B == 0).float(),
        "margin": difference_B,
        "mean_reward": (inputs.chosen_B + inputs.rejected_B) / 2,
    }
    return LossOutput(loss_B, metrics)


LOSSES.add("bradley_terry", Loss(bradley_terry, BradleyTerryConfig, PairScores))
