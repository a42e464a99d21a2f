"""Rewards of single tokens, whitening over all tokens of a batch, and credits from flat lists of completions.

A completion whose reward failed is NaN throughout: it counts nowhere, and its advantage is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accord.advantages.kl import KLConfig
from accord.advantages.records import Credit, Doubles, Group, Memory, kls_of

__all__ = ["credits", "rewards", "whiten"]

_VARIANCE = 1e-8
"""Added to a variance before dividing by its root, as in TRL's PPO."""


def rewards(group: Group, scores_K: Doubles, config: KLConfig, memory: Memory) -> list[Doubles]:
    """−β·KL at every token, and the score on top at the last one."""
    weighted = memory.kl_coefficient > 0
    found = [-memory.kl_coefficient * kl_L for kl_L in kls_of(group, config)] if weighted else []
    found = found or [np.zeros(length) for length in group.lengths]
    for reward_L, score in zip(found, scores_K, strict=True):
        reward_L[-1] += score
        reward_L += 0 * score  # NaN everywhere where the score is
    return found


def whiten(completions: Sequence[Doubles], *, keep_mean: bool = False) -> list[Doubles]:
    """(x − μ)/√(variance + 1e-8) over all tokens, variance with n − 1; with `keep_mean`, plus μ."""
    everything = np.concatenate(completions)
    everything = everything[~np.isnan(everything)]
    mean = everything.mean() if len(everything) else 0.0
    scale = (everything.var(ddof=1) if len(everything) > 1 else 0.0) + _VARIANCE
    return [(values_L - mean) / np.sqrt(scale) + (mean if keep_mean else 0.0) for values_L in completions]


def credits(
    groups: Sequence[Group], advantages: Sequence[Doubles], returns: Sequence[Doubles] | None = None
) -> list[list[Credit]]:
    """Per-token numbers of all completions, in their order, as credits by group; a NaN advantage is zero."""
    earned = iter(
        Credit(
            np.nan_to_num(advantage_L).astype(np.float32),
            None if returns is None else returns[place].astype(np.float32),
        )
        for place, advantage_L in enumerate(advantages)
    )
    return [[next(earned) for _ in group.lengths] for group in groups]
