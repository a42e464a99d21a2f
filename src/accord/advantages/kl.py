"""A KL to the reference in the reward: its settings, its estimate per token, and a weight that follows a target."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from accord.config import Config

__all__ = ["KLConfig", "adapted", "kl_of"]

_HORIZON = 10_000
_LARGEST_EXPONENT = 40.0


class KLConfig(Config):
    """Settings of every advantage that can have a KL in the reward."""

    kl_coefficient: float = Field(0.05, ge=0)
    """Weight of the KL to the reference in the reward; 0: none."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """With d = log π − log π_ref of the token: d, or e^−d + d − 1, which is never negative (Schulman 2020)."""
    kl_target: float | None = Field(None, gt=0)
    """Adapt the weight until the KL of a completion is this many nats (default: the weight stays)."""
    kl_horizon: int = Field(_HORIZON, gt=0)
    """Completions in which the weight may grow or shrink by about a fifth."""

    @model_validator(mode="after")
    def _kl_where_it_counts(self) -> Self:
        if self.kl_coefficient == 0 and (self.kl_estimator != "k1" or self.kl_target is not None):
            raise ValueError("kl_estimator and kl_target have no effect while kl_coefficient is 0")
        if self.kl_target is None and self.kl_horizon != _HORIZON:
            raise ValueError("kl_horizon has no effect without kl_target")
        return self


def kl_of(log_ratio_L: npt.NDArray[np.float64], estimator: Literal["k1", "k3"]) -> npt.NDArray[np.float64]:
    """An estimate of KL(π ‖ π_ref) from every token sampled from π, in nats; both have the right mean."""
    if estimator == "k1":
        return log_ratio_L
    kl_L: npt.NDArray[np.float64] = np.expm1(np.minimum(-log_ratio_L, _LARGEST_EXPONENT)) + log_ratio_L
    return kl_L


def adapted(coefficient: float, kl: float, completions: int, target: float, horizon: int) -> float:
    """The weight after a batch: β·(1 + clip(kl/target − 1, ±0.2)·completions/horizon) (Ziegler et al. 2019, §2.2).

    The paper has K_β = 0.1 in the place of completions/horizon; its code has this.

    Args:
        kl: mean over the batch's completions of the KL of a whole completion, in nats.
    """
    return coefficient * (1 + float(np.clip(kl / target - 1, -0.2, 0.2)) * completions / horizon)
