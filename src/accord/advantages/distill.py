"""On-policy distillation: a teacher says of every token that the policy has sampled how much better it could be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accord.advantages.records import ADVANTAGES, Advantage, Credit, Group, Memory
from accord.config import Config

__all__ = ["ReverseKLConfig", "reverse_kl"]


class ReverseKLConfig(Config):
    """Settings of the reverse KL to a teacher."""

    teacher: str | None = None
    """The model to learn from: hub id, directory, or `starter`; it must be named. Its tokens must be the policy's."""


def reverse_kl(groups: Sequence[Group], config: ReverseKLConfig, memory: Memory) -> list[list[Credit]]:  # noqa: ARG001
    """log π_T − log π of each token, and nothing of those behind it; scores are not read.

    On-policy its gradient is that of KL(π ‖ π_T), summed over the states that the policy comes to, these held as they
    are (Agarwal et al. 2024, "On-policy distillation", §3; Gu et al. 2024, eq. 2, without what a token earns later).
    """
    if any(not group.log_ratios for group in groups):
        raise ValueError("A reverse KL needs log_ratios: see BoundAdvantage.needs_reference.")
    return [[Credit((-ratio_L).astype(np.float32)) for ratio_L in group.log_ratios] for group in groups]


ADVANTAGES.add("reverse_kl", Advantage(reverse_kl, ReverseKLConfig, needs_reference=True, reads_scores=False))
