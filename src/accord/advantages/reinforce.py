"""REINFORCE with baselines (Williams 1992), and REINFORCE++ (Hu et al. 2025): advantages without a critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from accord.advantages.group import centred
from accord.advantages.kl import KLConfig
from accord.advantages.records import ADVANTAGES, Advantage, Credit, Group, Memory, net_scores, spread
from accord.advantages.tokens import credits, rewards, whiten

__all__ = ["ReinforceConfig", "ReinforcePlusPlusConfig", "reinforce", "reinforce_plus_plus"]


class ReinforceConfig(KLConfig):
    """Settings of REINFORCE's advantage."""

    baseline: Literal["none", "batch", "running"] = "batch"
    """What is taken from a score: nothing, the mean of the batch, or the mean of all batches before it."""


class ReinforcePlusPlusConfig(KLConfig):
    """Settings of REINFORCE++."""

    baseline: Literal["none", "group"] = "none"
    """What is taken from a score before the KL: nothing, or the mean of the prompt's scores (REINFORCE++-baseline)."""


def reinforce(groups: Sequence[Group], config: ReinforceConfig, memory: Memory) -> list[list[Credit]]:
    """r − β·KL of the whole completion, less the baseline.

    The mean of the batch holds the completion itself, which shrinks the gradient by 1 − 1/n.
    """
    scores = [net_scores(group, config, memory) for group in groups]
    baseline = memory.score if config.baseline == "running" else 0.0
    if config.baseline == "batch":
        everything = np.concatenate(scores)
        baseline = float(np.mean(everything[~np.isnan(everything)])) if not np.isnan(everything).all() else 0.0
    return spread(groups, [scores_K - baseline for scores_K in scores])


def reinforce_plus_plus(groups: Sequence[Group], config: ReinforcePlusPlusConfig, memory: Memory) -> list[list[Credit]]:
    """The sum of the rewards from a token on, brought to mean 0 and variance 1 over all tokens of the batch."""
    scores = [centred(group.scores_K) if config.baseline == "group" else group.scores_K for group in groups]
    to_go = [
        np.cumsum(reward_L[::-1])[::-1]
        for group, scores_K in zip(groups, scores, strict=True)
        for reward_L in rewards(group, scores_K, config, memory)
    ]
    return credits(groups, whiten(to_go))


ADVANTAGES.add("reinforce", Advantage(reinforce, ReinforceConfig))
ADVANTAGES.add("reinforce_plus_plus", Advantage(reinforce_plus_plus, ReinforcePlusPlusConfig))
