"""AOT: alignment via optimal transport (Melnyk et al. 2024): chosen beats rejected quantile by quantile.

B = pairs of the whole optimiser step. Log-probabilities are summed over completion tokens.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from accord.losses.preference import PairConfig, noisy_logistic, pair_output
from accord.losses.records import LOSSES, Loss, LossOutput, PreferenceLogprobs

__all__ = ["AOTConfig", "aot", "aot_unpaired"]


class AOTConfig(PairConfig):
    """Settings of the AOT losses."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a preference is recorded the wrong way round."""


def aot(inputs: PreferenceLogprobs, config: AOTConfig) -> LossOutput:
    """DPO's loss of the q-quantile of c − r minus the q-quantile of c_ref − r_ref, over all q."""
    return _output(inputs, config, inputs.chosen_B - inputs.rejected_B, inputs.ref_chosen_B - inputs.ref_rejected_B)


def aot_unpaired(inputs: PreferenceLogprobs, config: AOTConfig) -> LossOutput:
    """DPO's loss of the q-quantile of ĉ minus the q-quantile of r̂, over all q: which pair is whose does not matter."""
    return _output(inputs, config, inputs.chosen_B - inputs.ref_chosen_B, inputs.rejected_B - inputs.ref_rejected_B)


def _output(inputs: PreferenceLogprobs, config: AOTConfig, upper_B: Tensor, lower_B: Tensor) -> LossOutput:
    """Transport between two weighted samples in one dimension: Q = pieces of [0, 1] on which neither quantile moves.

    With equal weights a piece is a rank, and this is the paper's sort. A piece's loss counts for its row of `upper_B`.
    """
    upper_order_B, lower_order_B = upper_B.argsort(), lower_B.argsort()
    upper_end_B = inputs.weight_B[upper_order_B].cumsum(0)
    lower_end_B = inputs.weight_B[lower_order_B].cumsum(0)
    end_Q = torch.cat([upper_end_B, lower_end_B]).sort().values
    mass_Q = end_Q.diff(prepend=end_Q.new_zeros(1))
    middle_Q = end_Q - mass_Q / 2
    last = len(upper_B) - 1
    upper_Q = upper_order_B[torch.searchsorted(upper_end_B, middle_Q).clamp(max=last)]
    lower_Q = lower_order_B[torch.searchsorted(lower_end_B, middle_Q).clamp(max=last)]
    loss_Q = noisy_logistic(config.beta * (upper_B[upper_Q] - lower_B[lower_Q]), config.label_smoothing)
    loss_B = torch.zeros_like(upper_B).index_add(0, upper_Q, mass_Q * loss_Q) / inputs.weight_B
    chosen_B = config.beta * (inputs.chosen_B - inputs.ref_chosen_B)
    rejected_B = config.beta * (inputs.rejected_B - inputs.ref_rejected_B)
    return pair_output(inputs, config, loss_B, chosen_B, rejected_B)


LOSSES.add("aot", Loss(aot, AOTConfig, PreferenceLogprobs, couples_rows=True))
LOSSES.add("aot_unpaired", Loss(aot_unpaired, AOTConfig, PreferenceLogprobs, couples_rows=True))
