"""Advantages from comparing the completions of one prompt: group-relative (GRPO) and leave-one-out (RLOO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from accord.advantages.kl import KLConfig
from accord.advantages.records import ADVANTAGES, Advantage, Credit, Doubles, Group, Memory, net_scores, spread
from accord.config import Config

__all__ = ["GroupRelativeConfig", "RLOOConfig", "centred", "group_relative", "rloo"]

_EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""


class GroupRelativeConfig(Config):
    """Settings of the group-relative advantage."""

    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the prompt's scores (GRPO), of the whole batch's, or by nothing (Dr.GRPO)."""


class RLOOConfig(KLConfig):
    """Settings of the leave-one-out advantage."""

    normalise: bool = False
    """Bring the batch's advantages to mean 0 and standard deviation 1."""


def group_relative(groups: Sequence[Group], config: GroupRelativeConfig, memory: Memory) -> list[list[Credit]]:  # noqa: ARG001
    """(r − mean of the prompt's r) / (std + 1e-4) (Shao et al. 2024, §4.1.2), std with K − 1; `none`: Liu et al. 2025.

    A failed reward counts neither in mean nor in std; its advantage is zero, and so is that of the only one left.
    """
    advantages = [centred(group.scores_K) for group in groups]
    if config.scale != "none":
        everything = _std(np.concatenate([group.scores_K for group in groups]))
        stds = [_std(group.scores_K) if config.scale == "group" else everything for group in groups]
        advantages = [advantage_K / (std + _EPSILON) for advantage_K, std in zip(advantages, stds, strict=True)]
    return spread(groups, advantages)


def rloo(groups: Sequence[Group], config: RLOOConfig, memory: Memory) -> list[list[Credit]]:
    """r − β·KL less the mean of the same over the prompt's others (Kool et al. 2019; Ahmadian et al. 2024)."""
    advantages = []
    for group in groups:
        difference_K = centred(net_scores(group, config, memory))
        count = int((~np.isnan(difference_K)).sum())
        advantages.append(difference_K * (count / (count - 1) if count > 1 else np.nan))
    if config.normalise:
        everything = np.concatenate(advantages)
        std = _std(everything)
        advantages = [advantage_K / (std + _EPSILON) for advantage_K in np.split(centred(everything), _ends(groups))]
    return spread(groups, advantages)


def centred(scores_K: Doubles) -> Doubles:
    """Scores less their mean, NaN aside; exactly zero where all are equal, so that rounding teaches nothing."""
    present = scores_K[~np.isnan(scores_K)]
    if not len(present) or present.min() == present.max():
        return scores_K - scores_K
    difference_K: Doubles = scores_K - present.mean()
    return difference_K


def _ends(groups: Sequence[Group]) -> list[int]:
    """Where a flat list of all completions is cut into groups."""
    return np.cumsum([len(group.scores_K) for group in groups])[:-1].tolist()


def _std(scores: Doubles) -> float:
    """Standard deviation with n − 1, NaN aside; NaN of fewer than two."""
    present = scores[~np.isnan(scores)]
    return float(present.std(ddof=1)) if len(present) > 1 else float("nan")


ADVANTAGES.add("group_relative", Advantage(group_relative, GroupRelativeConfig, compares=True))
ADVANTAGES.add("rloo", Advantage(rloo, RLOOConfig, compares=True))
