"""Several rewards as one: weights, clipping, normalising, and what is reported of them. Failures are data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accord.errors import ConfigError, DataError, RunError
from accord.rewards.base import (
    REWARDS,
    Failed,
    Outcome,
    RewardConfig,
    RewardFunction,
    RewardKind,
    beside,
    outcome_of,
    reason_of,
)
from accord.rewards.custom import CustomConfig, custom
from accord.types import Completion, Prompt, Reward

__all__ = ["Outcomes", "Rewards", "failure_summary", "reward_metrics"]

Outcomes = dict[str, list[Outcome]]
"""What every reward says of every completion, by the reward's label."""

_EPSILON = 1e-4
"""Added to a standard deviation before division, as TRL's group-relative advantages do."""

FloatArray = NDArray[np.float64]


@dataclass(slots=True)
class _Moments:
    """Count, mean and sum of squared deviations of everything seen (Chan et al. 1979, eq. 1.5)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values_N: FloatArray) -> None:
        count, total = len(values_N), self.count + len(values_N)
        if count:
            mean = float(values_N.mean())
            difference = mean - self.mean
            self.squares += float(((values_N - mean) ** 2).sum()) + difference**2 * self.count * count / total
            self.mean += difference * count / total
            self.count = total

    def standardise(self, values_N: FloatArray) -> FloatArray:
        deviation = np.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return (values_N - self.mean) / (deviation + _EPSILON)


@dataclass(frozen=True, slots=True)
class _Part:
    label: str
    config: RewardConfig
    kind: RewardKind
    function: RewardFunction | None
    moments: _Moments = field(default_factory=_Moments)


class Rewards:
    """The rewards that a list of settings names, as one function of a batch.

    Example:
        >>> rewards = Rewards([{"name": "length", "max": 5}, {"name": "regex", "pattern": "blue", "weight": 0.5}])
        >>> rewards.labels
        ('length', 'regex')
    """

    def __init__(
        self,
        settings: Sequence[Mapping[str, Any]],
        tokenizer: Any = None,
        *,
        score: Callable[[Sequence[Prompt], Sequence[Completion]], Outcomes] | None = None,
    ) -> None:
        """Build every reward.

        Args:
            settings: one mapping per reward: `name`, the settings of `RewardConfig` and those of that reward.
            tokenizer: the policy's, where there is one; a reward model with the same one scores the sampler's tokens.
            score: what takes the place of `outcomes`: other processes that have these rewards. None is built here.

        Raises:
            ConfigError: none is given, a setting is wrong, two have the same label, or all have weight 0.
        """
        here = score is None
        self._parts = [_part(dict(each), number, tokenizer, build=here) for number, each in enumerate(settings, 1)]
        self._score = score or self.outcomes
        twice = [label for label, count in Counter(self.labels).items() if count > 1]
        if twice:
            fix = 'Give each a label of its own, e.g. label = "short".'
            raise ConfigError(f"Two rewards have the label {twice[0]!r}.", where="rewards", fix=fix)
        if not any(part.config.weight for part in self._parts):
            fix = "Add a table [[rewards]] with a name, and a weight other than 0; docs/rewards.md lists them."
            raise ConfigError("There is no reward to train on.", where="rewards", fix=fix)

    @classmethod
    def none(cls) -> Rewards:
        """No reward at all: every completion is worth 0, where nothing reads what it is worth."""
        rewards = cls.__new__(cls)
        rewards._parts, rewards._score = [], rewards.outcomes
        return rewards

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the parts, in order."""
        return tuple(part.label for part in self._parts)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check, before anything is sampled, that every prompt has what the rewards compare with.

        Raises:
            DataError: it names the first prompt without an answer or without requirements.
        """
        for part in self._parts:
            lacking = [prompt for prompt in prompts if part.kind.needs and not _has(prompt, part.kind.needs)]
            if lacking:
                first = lacking[0]
                what = (
                    f"{len(lacking):,} of {len(prompts):,} prompts have no {part.kind.needs}, which {part.label} needs."
                )
                fix = f"Give every prompt a column {part.kind.needs}, or remove these prompts; see docs/rewards.md"
                raise DataError(what, where=str(first.source or first.id), fix=fix)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Reward]:
        """The reward of every completion; prompt k belongs to completion k.

        value = Σ weight · part, each part clipped and normalised as its settings say; None if a part of any weight
        failed. Rewards that wait for others run beside those that compute. Where the environment failed, all do.

        Raises:
            ConfigError: a reward returned another number of values than there are completions, or no numbers.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
        if not completions:
            return []
        broken = [_environment_failure(completion) for completion in completions]
        whole = [k for k, failure in enumerate(broken) if not failure]
        scored = self._score([prompts[k] for k in whole], [completions[k] for k in whole]) if whole else {}
        outcomes: dict[str, list[Outcome]] = {label: [Failed(each) for each in broken] for label in self.labels}
        for label, values in scored.items():
            for k, value in zip(whole, values, strict=True):
                outcomes[label][k] = value
        used = {part.label: _used(part, outcomes[part.label]) for part in self._parts}
        rewards = []
        for k in range(len(completions)):
            said = {label: values[k] for label, values in outcomes.items()}
            failures = {label: value.reason for label, value in said.items() if isinstance(value, Failed)}
            parts = {label: None if isinstance(value, Failed) else value for label, value in said.items()}
            total = sum(part.config.weight * float(used[part.label][k]) for part in self._parts if part.config.weight)
            rewards.append(Reward(None if np.isnan(total) else float(total), parts, failures))
        return rewards

    def outcomes(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Outcomes:
        """What every reward says of every completion, before weights, clipping and normalising.

        Raises:
            ConfigError: as a call does.
        """

        def outcomes(part: _Part) -> list[Outcome]:
            return _outcomes(part, prompts, completions)

        # What computes stays in this thread: some functions set alarms, which only the main thread may.
        waiting = {part.label: beside(partial(outcomes, part)) for part in self._parts if part.kind.waits}
        computed = {part.label: outcomes(part) for part in self._parts if not part.kind.waits}
        return {label: waiting[label].result() if label in waiting else computed[label] for label in self.labels}

    def state(self) -> dict[str, dict[str, float]]:
        """What `normalise = "running"` has seen so far, for a checkpoint; can be written as JSON."""
        return {
            part.label: {"count": part.moments.count, "mean": part.moments.mean, "squares": part.moments.squares}
            for part in self._parts
            if part.config.normalise == "running"
        }

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from what `state` returned.

        Raises:
            RunError: it belongs to other rewards.
        """
        if state.keys() != self.state().keys():
            fix = "Resume with the rewards that the run was started with."
            raise RunError(f"The running means are those of {', '.join(state) or 'no reward'}.", fix=fix)
        for part in self._parts:
            if part.label in state:
                saved = state[part.label]
                part.moments.count = int(saved["count"])
                part.moments.mean, part.moments.squares = saved["mean"], saved["squares"]


def reward_metrics(rewards: Sequence[Reward]) -> dict[str, float]:
    """What a batch's rewards look like, under TRL's names, before clipping and normalising.

    ``rewards/NAME/mean`` and ``/std`` (n − 1) over the completions that have one, ``/failed`` the share that has none,
    and ``/failed/REASON`` the share by what the reason says before its colon. What cannot be computed is left out.
    """
    metrics: dict[str, float] = {}
    for label in rewards[0].parts if rewards else ():
        values = [value for reward in rewards if (value := reward.parts[label]) is not None]
        reasons = Counter(_kind_of(reward.failures[label]) for reward in rewards if label in reward.failures)
        if values:
            metrics[f"rewards/{label}/mean"] = float(np.mean(values))
        if len(values) > 1:
            metrics[f"rewards/{label}/std"] = float(np.std(values, ddof=1))
        metrics[f"rewards/{label}/failed"] = reasons.total() / len(rewards)
        metrics |= {f"rewards/{label}/failed/{kind}": count / len(rewards) for kind, count in sorted(reasons.items())}
    return metrics


def failure_summary(rewards: Sequence[Reward]) -> str | None:
    """One line for a person: which rewards failed how often and why, each with an example; None if none did.

    Example:
        >>> failure_summary([Reward(None, {"judge": None}, {"judge": "HTTP 503: busy"})])
        'judge failed for 1 of 1 completions: HTTP 503 1 (HTTP 503: busy)'
    """
    lines = []
    for label in rewards[0].parts if rewards else ():
        reasons = [reward.failures[label] for reward in rewards if label in reward.failures]
        if reasons:
            counts = Counter(map(_kind_of, reasons)).most_common()
            causes = ", ".join(f"{kind} {count}" for kind, count in counts)
            lines.append(
                f"{label} failed for {len(reasons)} of {len(rewards)} completions: {causes} ({reasons[0]:.200})"
            )
    return "; ".join(lines) or None


def _part(settings: dict[str, Any], number: int, tokenizer: Any, *, build: bool) -> _Part:
    name = settings.get("name")
    where = f"[[rewards]] {number}"
    if not isinstance(name, str):
        raise ConfigError("A reward without a name.", where=where, fix='Write e.g. name = "exact_answer".')
    own = ":" in name
    kind = RewardKind(CustomConfig, custom) if own else REWARDS[name]
    config = kind.config.build(settings, f"{where} ({name})")
    function: RewardFunction | None = kind.build(config, tokenizer) if build else None
    return _Part(config.label or (name.rpartition(":")[2] if own else name), config, kind, function)


def _environment_failure(completion: Completion) -> str:
    """Why its conversation broke off; empty if it did not."""
    episode = completion.episode
    return f"environment: {episode.failure}" if episode and episode.failure else ""


def _outcomes(part: _Part, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Outcome]:
    where = f"reward {part.label}"
    assert part.function is not None
    try:
        values = list(part.function(prompts, completions))
    except Exception as error:
        return [Failed(reason_of(error))] * len(completions)
    if len(values) != len(completions):
        fix = "Return one number, or None, for every completion, in order."
        raise ConfigError(f"It returned {len(values)} values for {len(completions)} completions.", where=where, fix=fix)
    try:
        return [outcome_of(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"It returned what is no number: {error}.", where=where, fix="Return numbers or None."
        ) from None


def _used(part: _Part, outcomes: Sequence[Outcome]) -> FloatArray:
    """What enters the sum, NaN for a failure."""
    values_N = np.array([value if isinstance(value, float) else np.nan for value in outcomes])
    if part.config.clip is not None:
        values_N = np.clip(values_N, *part.config.clip)
    if part.config.normalise == "none":
        return values_N
    moments = part.moments if part.config.normalise == "running" else _Moments()
    moments.add(values_N[~np.isnan(values_N)])
    return moments.standardise(values_N)


def _has(prompt: Prompt, needs: str) -> bool:
    return bool((prompt.answer or "").strip()) if needs == "answer" else bool(prompt.requirements)


def _kind_of(reason: str) -> str:
    return reason.partition(":")[0]
