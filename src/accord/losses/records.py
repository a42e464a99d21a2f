"""What a loss sees of the network, and what it returns. Small, named, and nothing of the model.

N = tokens that carry loss, B = pairs or labelled completions. Log-probabilities are in nats and float32. A pair's
weight is 1 over the pairs of its prompt, so every prompt counts once however many completions it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from accord.config import Config
from accord.registry import Registry

__all__ = [
    "LOSSES",
    "ControlledLogprobs",
    "LabelledLogprobs",
    "Loss",
    "LossOutput",
    "PairScores",
    "PreferenceLogprobs",
    "TokenLogprobs",
]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of single tokens.

    Example: ``TokenLogprobs(torch.tensor([-0.7, -2.3]), torch.ones(2))``
    """

    logprobs_N: Tensor
    weight_N: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weight_N


@dataclass(frozen=True, slots=True)
class PreferenceLogprobs:
    """Log-probabilities of chosen and rejected completions, summed over their tokens, of policy and reference.

    Example: ``PreferenceLogprobs(*(torch.tensor([x]) for x in (-12.0, -15.0, -13.0, -14.0)), torch.ones(1))``
    """

    chosen_B: Tensor
    rejected_B: Tensor
    ref_chosen_B: Tensor
    ref_rejected_B: Tensor
    weight_B: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weight_B


@dataclass(frozen=True, slots=True)
class LabelledLogprobs:
    """Log-probabilities of single completions, summed over their tokens, of policy and reference, and their labels.

    Example: ``LabelledLogprobs(torch.tensor([-12.0]), torch.tensor([-13.0]), torch.tensor([True]), torch.ones(1))``
    """

    policy_B: Tensor
    ref_B: Tensor
    good_B: Tensor
    """True for a thumb up, false for a thumb down."""
    weight_B: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weight_B


@dataclass(frozen=True, slots=True)
class ControlledLogprobs(LabelledLogprobs):
    """The same, and how far the policy has moved from the reference on completions that do not belong to the prompt.

    Example: ``ControlledLogprobs(*columns, control=torch.tensor(0.3))``
    """

    control: Tensor
    """Mean of log π − log π_ref over all control completions of the optimiser step: one number, without gradient."""


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scores of the better and the worse completion of a pair, and by how much the better should win.

    Example: ``PairScores(torch.tensor([1.2]), torch.tensor([0.4]), torch.zeros(1), torch.ones(1))``
    """

    chosen_B: Tensor
    rejected_B: Tensor
    margin_B: Tensor
    weight_B: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weight_B


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The loss of every row (not yet weighted or averaged) and metrics of the same shape.

    A metric is NaN in the rows that it does not speak of; its mean is over the others.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loss:
    """A registry row: a pure function of one record, its settings, and the record that it reads."""

    function: Callable[[Any, Any], LossOutput]
    config: type[Config]
    inputs: type[TokenLogprobs] | type[PreferenceLogprobs] | type[LabelledLogprobs] | type[PairScores]
    couples_rows: bool = False
    """Whether the loss of a row depends on other prompts' rows: then all of a step's rows are computed first."""
    derive: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    """Further metrics from the means of a step, for what is no mean over rows."""


LOSSES: Registry[Loss] = Registry("loss", "accord.losses")
