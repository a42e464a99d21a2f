"""The reward `environment`: what the environment itself gave to a conversation."""

from __future__ import annotations

from accord.rewards.base import REWARDS, Failed, Outcome, RewardConfig, RewardKind, pointwise
from accord.types import Completion, Prompt

__all__ = ["environment"]


def environment(_config: RewardConfig, _prompt: Prompt, completion: Completion) -> Outcome:
    """The sum of the rewards that the environment gave; a failure if it gave none."""
    if completion.episode is None:
        return Failed("there is no environment")
    return Failed("the environment gave none") if completion.episode.reward is None else completion.episode.reward


REWARDS.add("environment", RewardKind(RewardConfig, pointwise(environment)))
