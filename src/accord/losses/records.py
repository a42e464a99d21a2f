"""What a loss sees of the network, and what it returns. Small, named, and nothing of the model.

N = tokens that carry loss, B = pairs or labelled completions. Log-probabilities are in nats and float32. A pair's
weight is 1 over the pairs of its prompt, so every prompt counts once however many completions it has.

A loss that needs more of the head than the log-probability of the target names it (`Loss.statistics`), and finds it in
its record, else None: `log_sum_squares`, log Σ_v p(v)² over the vocabulary, `mean_logprob`, the mean of log p(v),
`entropy` and `constant_entropy`, −Σ_v p(v)·log p(v) with and without gradient, and `values`, those of a value head.
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
    "BoundLoss",
    "ControlledLogprobs",
    "LabelledLogprobs",
    "Loss",
    "LossOutput",
    "PairLogprobs",
    "PairScores",
    "PreferenceLogprobs",
    "RatingScores",
    "Record",
    "ReferencedRolloutTokens",
    "RolloutTokens",
    "TokenLogprobs",
    "ValueTokens",
]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of single tokens.

    Example: ``TokenLogprobs(torch.tensor([-0.7, -2.3]), torch.ones(2))``
    """

    logprobs_N: Tensor
    weight_N: Tensor
    mean_logprob_N: Tensor | None = None
    """Mean of log p(v) over the vocabulary, where the loss asks for it."""

    @property
    def weight(self) -> Tensor:
        return self.weight_N


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogprobs:
    """Chosen and rejected completions as the policy alone sees them: log-probabilities summed over their tokens.

    Example: ``PairLogprobs(chosen_B=…, rejected_B=…, chosen_length_B=…, rejected_length_B=…, weight_B=…)``
    """

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_length_B: Tensor
    """Tokens that carry loss."""
    rejected_length_B: Tensor
    weight_B: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weight_B


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLogprobs(PairLogprobs):
    """The same, and what the reference model says of them."""

    ref_chosen_B: Tensor
    ref_rejected_B: Tensor
    chosen_tail_B: Tensor
    """The part of chosen_B − ref_chosen_B that lies in tokens beyond the length of the shorter completion."""
    rejected_tail_B: Tensor
    chosen_log_sum_squares_B: Tensor | None = None
    """log Σ_v p(v)², summed over tokens, without gradient, where the loss asks for it."""
    rejected_log_sum_squares_B: Tensor | None = None


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
    """Scores of a pair's completions, by how much the chosen one should win, and how probable it is that it is better.

    Example: ``PairScores(torch.tensor([1.2]), torch.tensor([0.4]), torch.zeros(1), torch.ones(1), torch.ones(1))``
    """

    chosen_B: Tensor
    rejected_B: Tensor
    margin_B: Tensor
    probability_B: Tensor
    weight_B: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weight_B


@dataclass(frozen=True, slots=True)
class RatingScores:
    """Predicted and given ratings, one row for every rating that the data has, in standard deviations of its attribute.

    Example: ``RatingScores(torch.tensor([0.3]), torch.tensor([-0.8]), torch.ones(1))``
    """

    scores_R: Tensor
    targets_R: Tensor
    weight_R: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weight_R


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTokens:
    """Tokens of sampled completions as the policy sees them now, and what is known since they were sampled.

    How a step averages (over tokens, over completions, by a constant) stands in `weight_N` and in the step's
    denominator, not in the loss.

    Example: ``RolloutTokens(logprobs_N=…, behaviour_N=…, advantage_N=…, weight_N=…, completion_N=…, completions=8)``
    """

    logprobs_N: Tensor
    behaviour_N: Tensor
    """Log-probabilities of the policy that sampled; where that is this one, they may be its own, without gradient."""
    advantage_N: Tensor
    weight_N: Tensor
    completion_N: Tensor
    """Which completion a token belongs to, 0 … `completions` − 1. A completion's tokens are all here."""
    completions: int
    reference_N: Tensor | None = None
    """Log-probabilities of the reference model."""
    entropy_N: Tensor | None = None
    """With gradient or without, as the loss asks."""
    values_N: Tensor | None = None
    """What the value head says now of the state before each token, with gradient."""
    old_values_N: Tensor | None = None
    """What it said when the completion was sampled."""
    returns_N: Tensor | None = None
    """What it should have said."""

    @property
    def weight(self) -> Tensor:
        return self.weight_N


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencedRolloutTokens(RolloutTokens):
    """The same, with log-probabilities of the reference model always."""

    reference_N: Tensor


@dataclass(frozen=True, slots=True)
class ValueTokens:
    """Tokens of sampled completions as a separate critic sees them.

    Example: ``ValueTokens(torch.tensor([0.2]), torch.tensor([0.1]), torch.tensor([1.0]), torch.ones(1))``
    """

    values_N: Tensor
    old_values_N: Tensor
    returns_N: Tensor
    weight_N: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weight_N


Record = TokenLogprobs | PairLogprobs | LabelledLogprobs | PairScores | RatingScores | RolloutTokens | ValueTokens
"""What a loss can read."""


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
    inputs: type[Record]
    couples_rows: bool = False
    """Whether the loss of a row depends on other prompts' rows: then all of a step's rows are computed first."""
    derive: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    """Further metrics from the means of a step, for what is no mean over rows."""
    statistics: frozenset[str] = frozenset()
    """What the record must hold beyond log-probabilities."""
    only_advantage: bool = False
    """Whether a token of advantage zero has no gradient, so that groups of nothing else can be left out of a step."""
    specialise: Callable[[Any], Loss] | None = None
    """The row under given settings, for a loss whose settings change what it reads."""

    def bind(self, settings: Mapping[str, Any], where: str = "[loss]") -> BoundLoss:
        """The loss under checked settings.

        Raises:
            ConfigError: a setting is unknown, of the wrong type, out of range, or would have no effect.
        """
        config = self.config.build(settings, where)
        return BoundLoss(self.specialise(config) if self.specialise else self, config)


@dataclass(frozen=True, slots=True)
class BoundLoss:
    """A loss with its settings."""

    loss: Loss
    config: Config


LOSSES: Registry[Loss] = Registry("loss", "accord.losses")
