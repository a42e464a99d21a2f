"""GAE: generalised advantage estimation (Schulman et al. 2016, eq. 16), with the rewards of InstructGPT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from accord.advantages.kl import KLConfig
from accord.advantages.records import ADVANTAGES, Advantage, Credit, Doubles, Group, Memory
from accord.advantages.tokens import credits, rewards, whiten

__all__ = ["GAEConfig", "gae", "gae_of"]


class GAEConfig(KLConfig):
    """Settings of generalised advantage estimation."""

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a reward one token later."""
    lam: float = Field(0.95, ge=0, le=1)
    """The paper's λ: at 1 an advantage reads the rewards up to the end, at 0 one reward and the next value."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken from the score of a completion that the token limit ended."""
    whiten_rewards: bool = False
    """Bring the batch's token rewards to variance 1; their mean stays."""
    whiten_advantages: bool = True
    """Bring the batch's advantages to mean 0 and variance 1, after the returns are taken."""


def gae(groups: Sequence[Group], config: GAEConfig, memory: Memory) -> list[list[Credit]]:
    """Advantages and returns of every token; the returns are advantages + values before whitening.

    The score stands on the last token, and −β·KL on every one (Ouyang et al. 2022, eq. 2). Nothing comes after the last
    token, also where the token limit ended the completion. A completion whose reward failed keeps its values as
    returns; its tokens should have weight 0.
    """
    if any(not group.values for group in groups):
        raise ValueError("GAE needs values of every completion.")
    reward = [
        reward_L
        for group in groups
        for reward_L in rewards(group, _scores(group, config.missing_eos_penalty), config, memory)
    ]
    if config.whiten_rewards:
        reward = whiten(reward, keep_mean=True)
    values = [value_L.astype(float) for group in groups for value_L in group.values]
    advantages = [gae_of(r_L, v_L, config.gamma, config.lam) for r_L, v_L in zip(reward, values, strict=True)]
    returns = [np.nan_to_num(a_L) + v_L for a_L, v_L in zip(advantages, values, strict=True)]
    return credits(groups, whiten(advantages) if config.whiten_advantages else advantages, returns)


def gae_of(reward_L: Doubles, value_L: Doubles, gamma: float, lam: float) -> Doubles:
    """A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} − V_t: [L]; V and A are zero after the last token."""
    delta_L = reward_L + gamma * np.append(value_L[1:], 0.0) - value_L
    advantage_L, after = np.empty_like(delta_L), 0.0
    for place in range(len(delta_L) - 1, -1, -1):
        after = advantage_L[place] = delta_L[place] + gamma * lam * after
    return advantage_L


def _scores(group: Group, penalty: float) -> Doubles:
    truncated_K = np.array(group.truncated or (False,) * len(group.lengths))
    return group.scores_K - penalty * truncated_K


ADVANTAGES.add("gae", Advantage(gae, GAEConfig, needs_values=True))
