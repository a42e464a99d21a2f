"""Rewards in several processes of a Ray cluster: each scores a share of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from accord.engine.actors import InActor, actors
from accord.rewards.base import Outcome
from accord.rewards.mixture import Outcomes, Rewards
from accord.types import Completion, Prompt

__all__ = ["ray_rewards"]

Score = Callable[[Sequence[Prompt], Sequence[Completion]], Outcomes]


@contextmanager
def ray_rewards(settings: Sequence[Mapping[str, Any]], tokenizer: Any, count: int) -> Iterator[Rewards]:
    """`Rewards` that so many Ray actors compute; weights, clipping and normalising stay here, over the whole batch.

    The completions of a prompt go to the same actor. A share whose process is lost is scored again by its successor.

    Raises:
        ConfigError, ModelError: an actor cannot build a reward.
    """
    with actors(_RewardActor, (list(settings), tokenizer), count) as started:
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(lambda actor: actor.call("build"), started))
        yield Rewards(settings, score=_shared([partial(actor.call, "outcomes") for actor in started]))


def _shared(workers: Sequence[Score]) -> Score:
    """The outcomes of a batch, of which every worker scores a share."""

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Outcomes:
        shares = _shares([prompt.id for prompt in prompts], len(workers))
        batches = [([prompts[k] for k in mine], [completions[k] for k in mine]) for mine in shares]
        with ThreadPoolExecutor(len(workers)) as threads:
            found = list(threads.map(lambda worker, batch: worker(*batch), workers, batches))
        outcomes: dict[str, dict[int, Outcome]] = {}
        for mine, said in zip(shares, found, strict=True):
            for label, values in said.items():
                outcomes.setdefault(label, {}).update(zip(mine, values, strict=True))
        return {label: [values[k] for k in range(len(completions))] for label, values in outcomes.items()}

    return score


def _shares(prompts: Sequence[str], parts: int) -> list[list[int]]:
    """Places of completions for every part, those of a prompt together, prompts in turn."""
    turns = {prompt: turn % parts for turn, prompt in enumerate(dict.fromkeys(prompts))}
    return [[k for k, prompt in enumerate(prompts) if turns[prompt] == part] for part in range(parts)]


class _RewardActor(InActor):
    """All rewards, in the process of an actor."""

    def __init__(self, directory: str, settings: Sequence[Mapping[str, Any]], tokenizer: Any) -> None:
        super().__init__(directory)
        self._settings, self._tokenizer = settings, tokenizer
        self._rewards: Rewards | None = None

    def build(self) -> None:
        """Build the rewards, so that what is wrong with them is known before anything is sampled."""
        self._rewards = self._rewards or Rewards(self._settings, self._tokenizer)

    def outcomes(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Outcomes:
        """What every reward says of every completion."""
        self.build()
        assert self._rewards is not None
        return self._rewards.outcomes(prompts, completions)
