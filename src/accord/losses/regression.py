"""Regression: a reward model that predicts ratings (Wang et al. 2023, HelpSteer; mean squared error).

R = ratings: one row for every completion and every attribute that it was rated on, so a completion that lacks an
attribute has no row for it. Scores and targets are in standard deviations of the attribute's ratings.
"""

from __future__ import annotations

from accord.config import Config
from accord.losses.records import LOSSES, Loss, LossOutput, RatingScores

__all__ = ["RegressionConfig", "regression"]


class RegressionConfig(Config):
    """Regression has no settings of its own."""


def regression(inputs: RatingScores, config: RegressionConfig) -> LossOutput:  # noqa: ARG001
    """(score − target)²; always predicting the mean gives 1."""
    error_R = inputs.scores_R - inputs.targets_R
    return LossOutput(error_R**2, {"absolute_error": error_R.abs()})


LOSSES.add("regression", Loss(regression, RegressionConfig, RatingScores, statistics=frozenset({"ratings"})))
