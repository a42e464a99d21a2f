"""Rewards: what a completion is worth in training. Rules, tests, judges, reward models, functions of one's own."""

from accord.rewards import answers, environment, judge, python_tests, reward_model, rules
from accord.rewards.base import REWARDS, Failed, Outcome, RewardConfig, RewardFunction, RewardKind, pointwise
from accord.rewards.mixture import Rewards, failure_summary, reward_metrics

# Importing a module registers its rewards.
_BUILT_IN = (answers, environment, judge, python_tests, reward_model, rules)

__all__ = [
    "REWARDS",
    "Failed",
    "Outcome",
    "RewardConfig",
    "RewardFunction",
    "RewardKind",
    "Rewards",
    "failure_summary",
    "pointwise",
    "reward_metrics",
]
