"""Divergences that hold the policy to its reference in place of the reverse KL (Wang et al. 2023, "Beyond Reverse KL").

For a divergence D_f the reward of a completion is β·f′(π/π_ref) up to a constant of the prompt, so a loss
that is a function of the reward difference takes f′ in place of the log-ratio.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from accord.losses.preference import PreferenceConfig, log_ratios
from accord.losses.records import PreferenceLogprobs

__all__ = ["DivergenceConfig", "scores"]

_LARGEST_EXPONENT = 40.0
"""The square of e^44 overflows float32. Beyond this the score is constant: a loss is saturated, or hopeless, there."""


class DivergenceConfig(PreferenceConfig):
    """Settings of the losses of a reward difference."""

    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What holds the policy to the reference."""
    divergence_alpha: float | None = Field(None, gt=0, lt=1)
    """The α of `alpha_divergence`: towards 0 it is the reverse KL, towards 1 the forward KL. TRL's is 1 − α."""

    @model_validator(mode="after")
    def _alpha_where_it_counts(self) -> Self:
        if (self.divergence == "alpha_divergence") != (self.divergence_alpha is not None):
            raise ValueError('divergence = "alpha_divergence" and divergence_alpha go together')
        return self


def scores(inputs: PreferenceLogprobs, config: DivergenceConfig) -> tuple[Tensor, Tensor]:
    """Scores f′(π/π_ref) of the chosen and the rejected completion [B]; for the reverse KL, ĉ and r̂."""
    chosen_B, rejected_B = log_ratios(inputs, config)
    return _score(chosen_B, config), _score(rejected_B, config)


def _score(log_ratio_B: Tensor, config: DivergenceConfig) -> Tensor:
    """f′(u) at u = e^(log-ratio), up to a constant that cancels between chosen and rejected."""
    if config.divergence == "reverse_kl":
        return log_ratio_B  # f′(u) = log u + 1
    if config.divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio_B)  # f′(u) = log(2u / (1 + u))
    alpha = 1.0 if config.divergence_alpha is None else config.divergence_alpha
    # f′(u) = (1 − u^−α)/α; the forward KL's −1/u is α = 1.
    return (1 - torch.exp((-alpha * log_ratio_B).clamp(max=_LARGEST_EXPONENT))) / alpha
