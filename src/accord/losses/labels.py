"""What the losses of labelled completions share: their settings, and metrics that keep the two labels apart.

B = labelled completions. Log-probabilities are summed over completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from accord.config import Config
from accord.losses.records import LabelledLogprobs

__all__ = ["LabelConfig", "label_metrics", "margin", "signs"]

_LOW, _HIGH = 1.0, 4 / 3
"""Where good · desirable_weight / (bad · undesirable_weight) should be (Ethayarajh et al. 2024, §4.2)."""


class LabelConfig(Config):
    """Settings of a loss of labelled completions."""

    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference: rewards are β · (log π − log π_ref)."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of a completion with a thumb up."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of a completion with a thumb down."""

    def balance(self, good: int, bad: int) -> str:
        """One line on so many good and bad completions, with the setting that balances them if the weights do not.

        Example:
            >>> LabelConfig().balance(3, 1)
            '3 good and 1 bad completions weigh 3 : 1. Best is 1 : 1 to 4 : 3: --set loss.undesirable_weight=2.57'
        """
        counts = f"{good:,} good and {bad:,} bad completions"
        if not good or not bad:
            return f"{counts}: all labels are the same, so there is nothing to learn a difference from."
        ratio = good * self.desirable_weight / (bad * self.undesirable_weight)
        if _LOW <= ratio <= _HIGH:
            return f"{counts} weigh {ratio:.3g} : 1."
        wanted = (_LOW + _HIGH) / 2  # the middle, so that rounding does not leave the range
        setting, weight = (
            ("desirable_weight", self.desirable_weight * wanted / ratio)
            if ratio < _LOW
            else ("undesirable_weight", self.undesirable_weight * ratio / wanted)
        )
        advice = f"Best is 1 : 1 to 4 : 3: --set loss.{setting}={weight:.3g}"
        return f"{counts} weigh {ratio:.3g} : 1. {advice}"


def signs(inputs: LabelledLogprobs, config: LabelConfig) -> tuple[Tensor, Tensor]:
    """+1 for a thumb up and −1 for a thumb down, and the weight of each: [B] twice."""
    one_B = torch.ones_like(inputs.policy_B)
    weight_B = torch.where(inputs.good_B, config.desirable_weight * one_B, config.undesirable_weight * one_B)
    return torch.where(inputs.good_B, one_B, -one_B), weight_B


def label_metrics(inputs: LabelledLogprobs, config: LabelConfig) -> dict[str, Tensor]:
    """Rewards and log-probabilities of the good ("chosen") and the bad ("rejected"); NaN in the other rows."""
    reward_B = config.beta * (inputs.policy_B - inputs.ref_B)
    sides = {"chosen": inputs.good_B, "rejected": ~inputs.good_B}
    return {
        f"{name}/{side}": values.masked_fill(~rows, torch.nan)
        for name, values in {"rewards": reward_B, "logps": inputs.policy_B}.items()
        for side, rows in sides.items()
    }


def margin(means: Mapping[str, float]) -> dict[str, float]:
    """`rewards/margins`: mean reward of the step's good completions minus that of its bad ones, if it has both."""
    sides = "rewards/chosen", "rewards/rejected"
    return {"rewards/margins": means[sides[0]] - means[sides[1]]} if all(side in means for side in sides) else {}
