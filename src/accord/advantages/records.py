"""What an advantage sees of sampled completions, and what it returns.

K = completions of one prompt, L = tokens of one completion that the policy sampled. Scores and values are in units of
reward, log-probabilities in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from accord.advantages.kl import KLConfig, adapted, kl_of
from accord.config import Config
from accord.errors import ConfigError, RunError
from accord.registry import Registry

__all__ = [
    "ADVANTAGES",
    "Advantage",
    "BoundAdvantage",
    "Credit",
    "Doubles",
    "Group",
    "Memory",
    "is_idle",
    "kls_of",
    "net_scores",
    "spread",
]

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The completions of one prompt.

    Example: ``Group(np.array([1.0, 0.0]), lengths=(12, 7))``
    """

    scores_K: Doubles
    """The reward of each completion; NaN where it failed."""
    lengths: tuple[int, ...]
    """Tokens of each completion."""
    truncated: tuple[bool, ...] = ()
    """Which completions the token limit ended (default: none)."""
    log_ratios: tuple[npt.NDArray[np.floating[Any]], ...] = ()
    """log π − log π_ref of every token of each completion, [L], where a KL is part of the reward."""
    values: tuple[npt.NDArray[np.floating[Any]], ...] = ()
    """The critic's value of the state before every token of each completion, [L], where there is a critic."""

    def __post_init__(self) -> None:
        count = len(self.scores_K)
        columns = {"lengths": self.lengths, "truncated": self.truncated, "log_ratios": self.log_ratios}
        for name, column in {**columns, "values": self.values}.items():
            if len(column) != count and (column or name == "lengths"):
                raise ValueError(f"{len(column)} {name} for {count} scores.")
        for name, arrays in {"log_ratios": self.log_ratios, "values": self.values}.items():
            if arrays and tuple(map(len, arrays)) != self.lengths:
                raise ValueError(f"{name} of {list(map(len, arrays))} tokens for completions of {list(self.lengths)}.")
        if min(self.lengths, default=1) < 1:
            raise ValueError("A completion has at least one token: its stop token.")


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """What one completion earns, token by token; advantages of zero where its reward failed."""

    advantage_L: npt.NDArray[np.float32]
    return_L: npt.NDArray[np.float32] | None = None
    """What the critic should have said of the state before each token, where there is a critic."""


@dataclass(slots=True)
class Memory:
    """What an advantage carries from one batch to the next."""

    kl_coefficient: float = 0.0
    """Weight of the KL in the reward, as it is now."""
    score: float = 0.0
    """Mean score, less the weighted KL, of all completions so far."""
    count: int = 0
    """How many these were."""


@dataclass(frozen=True, slots=True)
class Advantage:
    """A registry row: a pure function of a batch of groups, its settings, and what was remembered before the batch."""

    function: Callable[[Sequence[Group], Any, Memory], list[list[Credit]]]
    config: type[Config]
    compares: bool = False
    """Whether completions of one prompt are compared, so that there must be two at least."""
    needs_values: bool = False
    needs_reference: bool = False
    """Whether it reads log-ratios to a reference whatever its settings are."""
    reads_scores: bool = True
    """Whether there must be a reward."""

    def bind(self, settings: Mapping[str, Any], where: str = "[advantage]") -> BoundAdvantage:
        """The advantage under checked settings, with a memory of its own.

        Raises:
            ConfigError: a setting is unknown, of the wrong type, out of range, or would have no effect.
        """
        return BoundAdvantage(self, self.config.build(settings, where))


class BoundAdvantage:
    """An advantage with its settings and its memory.

    Attributes:
        needs_reference: whether groups must hold `log_ratios`.
    """

    def __init__(self, advantage: Advantage, config: Config) -> None:
        self.advantage, self.config = advantage, config
        has_kl = isinstance(config, KLConfig) and config.kl_coefficient > 0
        self.needs_reference = advantage.needs_reference or has_kl
        self.memory = Memory(kl_coefficient=config.kl_coefficient if isinstance(config, KLConfig) else 0.0)

    def __call__(self, groups: Sequence[Group]) -> list[list[Credit]]:
        """The credit of every completion of a whole batch; then scores and KL of the batch enter the memory.

        Raises:
            ConfigError: completions are compared, and a prompt has a single one.
        """
        if self.advantage.compares and any(len(group.scores_K) < 2 for group in groups):
            what = "This advantage compares the completions of one prompt, and here is a single one."
            raise ConfigError(what, where="[advantage]", fix="Sample two or more completions per prompt.")
        credits = self.advantage.function(groups, self.config, self.memory)
        if isinstance(self.config, KLConfig):
            self._remember(groups, self.config)
        return credits

    def state(self) -> dict[str, float | int]:
        """The memory, for a checkpoint (JSON)."""
        return dataclasses.asdict(self.memory)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the memory that `state` returned.

        Raises:
            RunError: it is of another kind.
        """
        if state.keys() != self.state().keys():
            fix = "Resume with the version of Accord that wrote it."
            raise RunError(f"This is no memory of an advantage: {', '.join(state) or 'empty'}.", fix=fix)
        self.memory = Memory(**state)

    def _remember(self, groups: Sequence[Group], config: KLConfig) -> None:
        memory = self.memory
        scores = np.concatenate([net_scores(group, config, memory) for group in groups])
        scores = scores[~np.isnan(scores)]
        memory.count += len(scores)
        memory.score += float((scores - memory.score).sum()) / max(1, memory.count)
        if config.kl_target is not None:
            sums = [float(ratio_L.sum(dtype=float)) for group in groups for ratio_L in group.log_ratios]
            memory.kl_coefficient = adapted(
                memory.kl_coefficient, float(np.mean(sums)), len(sums), config.kl_target, config.kl_horizon
            )


def net_scores(group: Group, config: KLConfig, memory: Memory) -> Doubles:
    """Scores less the weighted KL of the whole completion: [K]."""
    if memory.kl_coefficient == 0:
        return group.scores_K
    kls = [kl_L.sum() for kl_L in kls_of(group, config)]
    return group.scores_K - memory.kl_coefficient * np.array(kls)


def kls_of(group: Group, config: KLConfig) -> list[Doubles]:
    """The KL of every token of every completion."""
    if not group.log_ratios:
        raise ValueError("A KL in the reward needs log_ratios: see BoundAdvantage.needs_reference.")
    return [kl_of(ratio_L.astype(float), config.kl_estimator) for ratio_L in group.log_ratios]


def spread(groups: Sequence[Group], advantages: Sequence[Doubles]) -> list[list[Credit]]:
    """One advantage per completion, given to each of its tokens; zero where it is NaN."""
    return [
        [
            Credit(np.full(length, np.nan_to_num(advantage), np.float32))
            for length, advantage in zip(group.lengths, advantage_K, strict=True)
        ]
        for group, advantage_K in zip(groups, advantages, strict=True)
    ]


def is_idle(credits: Sequence[Credit]) -> bool:
    """Whether no token of these completions has an advantage.

    A loss that reads advantages alone (`accord.losses.Loss.only_advantage`) has then no gradient in them: leaving them
    out and keeping the denominator changes nothing.
    """
    return not any(credit.advantage_L.any() for credit in credits)


ADVANTAGES: Registry[Advantage] = Registry("advantage", "accord.advantages")
"""From scores to the credit of every token."""
