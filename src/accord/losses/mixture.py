"""A weighted sum of losses of pairs, as in MPO: mixed preference optimisation (Wang et al. 2024).

B = pairs. The parts read the same record, so a mixture costs one pass, as a single loss does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from accord.config import Config
from accord.losses.records import LOSSES, BoundLoss, Loss, LossOutput, PairLogprobs, PreferenceLogprobs

__all__ = ["MixtureConfig", "Part", "mixture"]


@dataclass(frozen=True, slots=True)
class Part:
    """A loss with its settings, and its weight in the sum."""

    bound: BoundLoss
    weight: float


class MixtureConfig(Config):
    """Settings of a weighted sum of losses."""

    parts: dict[str, dict[str, Any]] = Field(min_length=1)
    """By name of the loss: its `weight` (default 1), and its settings."""

    @cached_property
    def losses(self) -> dict[str, Part]:
        """The parts by name, with checked settings."""
        found = {}
        for name, settings in self.parts.items():
            weight = settings.get("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"parts.{name}.weight must be a number above 0")
            rest = {key: value for key, value in settings.items() if key != "weight"}
            bound = LOSSES[name].bind(rest, where=f"[loss.parts.{name}]")
            if not issubclass(PreferenceLogprobs, bound.loss.inputs):
                raise ValueError(f"{name} is not a loss of pairs, so it cannot be a part of a mixture")
            found[name] = Part(bound, float(weight))
        return found

    @model_validator(mode="after")
    def _parts_are_right(self) -> Self:
        _ = self.losses
        return self


def mixture(inputs: PairLogprobs, config: MixtureConfig) -> LossOutput:
    """Σ weight · loss. Rewards and accuracy are those of the first part; `loss/NAME` is each part's own loss."""
    outputs = {name: part.bound.loss.function(inputs, part.bound.config) for name, part in config.losses.items()}
    weighted = [part.weight * outputs[name].loss for name, part in config.losses.items()]
    metrics = {key: value for output in reversed(outputs.values()) for key, value in output.metrics.items()}
    metrics |= {f"loss/{name}": output.loss for name, output in outputs.items()}
    return LossOutput(torch.stack(weighted).sum(0), metrics)


def _needs(config: MixtureConfig) -> Loss:
    """What the parts need together: a reference, other rows or a statistic only if one of them does."""
    losses = [part.bound.loss for part in config.losses.values()]
    with_reference = any(loss.inputs is PreferenceLogprobs for loss in losses)
    return Loss(
        mixture,
        MixtureConfig,
        PreferenceLogprobs if with_reference else PairLogprobs,
        couples_rows=any(loss.couples_rows for loss in losses),
        statistics=frozenset().union(*(loss.statistics for loss in losses)),
    )


LOSSES.add("mixture", Loss(mixture, MixtureConfig, PreferenceLogprobs, specialise=_needs))
