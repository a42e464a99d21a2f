"""Rollouts of several turns: policy and environment by turns, in the sampler's own tokens from the first to the last.

The row of a conversation is prompt + what was sampled + what was observed + what was sampled + …; a turn's request is
the row so far. Nothing that was sampled is ever encoded again: observations are rendered by the chat template as what
follows, and are the only new tokens.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from accord.environments import End, Environment, Environments, Observation, Turn
from accord.errors import ConfigError
from accord.models.render import Renderer
from accord.rewards.base import beside, reason_of
from accord.sampling.request import Request, SamplingConfig, completion_seed
from accord.sampling.stops import cut
from accord.types import Completion, Episode, Message, Prompt, StopReason

__all__ = ["Conversations", "Table"]

_CONCURRENCY = 32
"""Environments that answer at the same time."""


@dataclass(slots=True, eq=False)
class _Talk:
    """One conversation so far."""

    prompt: Prompt
    first: Request
    turns: list[Completion] = field(default_factory=list)
    environment: Environment | None = None
    token_ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    truncated: bool = False

    def say(self, turn: Completion) -> None:
        self.turns.append(turn)
        self.token_ids += turn.token_ids
        self.sampled += [True] * len(turn.token_ids)
        self.logprobs += turn.logprobs
        self.raw_logprobs += turn.raw_logprobs

    def observe(self, token_ids: Sequence[int], messages: Sequence[Message]) -> None:
        self.token_ids += token_ids
        self.sampled += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self.raw_logprobs += [0.0] * len(token_ids)
        self.messages += messages

    def add(self, answer: Observation | End) -> None:
        if answer.reward is not None:
            self.reward = (self.reward or 0.0) + answer.reward
        for name, value in answer.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value

    def completion(self) -> Completion:
        """The conversation as one completion."""
        last = self.turns[-1]
        reason: StopReason = "length" if self.truncated else last.stop_reason
        reward = 0.0 if self.truncated and self.reward is None else self.reward
        episode = Episode(
            tuple(self.messages),
            tuple(self.sampled),
            len(self.turns),
            None if self.failure else reward,
            self.failure,
            self.parts,
        )
        return replace(
            last,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            raw_logprobs=tuple(self.raw_logprobs),
            stop_reason=reason,
            seed=self.first.seed,
            episode=episode,
        )


class Conversations:
    """How a policy and its environments talk.

    Args:
        renderer: the policy's.
        rewarded: whether what environments give is a reward of the run.
    """

    def __init__(
        self, environments: Environments, renderer: Renderer, sampling: SamplingConfig, *, rewarded: bool
    ) -> None:
        self.environments, self.renderer, self.sampling, self.rewarded = environments, renderer, sampling, rewarded
        self.slots = threading.Semaphore(_CONCURRENCY)
        if (environments.config.max_turn_tokens or 0) > sampling.max_new_tokens:
            what = f"A turn cannot have more tokens than the whole conversation: {sampling.max_new_tokens}."
            fix = "Lower it, or raise sampling.max_new_tokens."
            raise ConfigError(what, where="environment.max_turn_tokens", fix=fix)

    def table(self, prompts: Sequence[Prompt], requests: Sequence[Request]) -> Table:
        """New conversations; request k is the first turn after prompt k."""
        longest = self.longest_turn(self.sampling.max_new_tokens)
        first = [replace(request, max_new_tokens=longest) for request in requests]
        return Table(self, [_Talk(*each) for each in zip(prompts, first, strict=True)])

    def longest_turn(self, room: int) -> int:
        """Tokens that a turn may have where this many are left."""
        return min(room, self.environments.config.max_turn_tokens or room)


class Table:
    """The conversations of one call of a sampler, which calls `follow` from whatever thread it likes."""

    def __init__(self, owner: Conversations, talks: Sequence[_Talk]) -> None:
        self._owner, self._talks = owner, talks

    @property
    def requests(self) -> list[Request]:
        """What the sampler begins with."""
        return [talk.first for talk in self._talks]

    def completion(self, index: int) -> Completion:
        """A conversation that is over."""
        return self._talks[index].completion()

    def follow(self, index: int, turn: Completion) -> Future[Request | None]:
        """What the policy is asked next, once the environment has answered; None if the conversation is over.

        Raises (when the result is asked for):
            ConfigError: the environment gives a reward that the run does not read.
            RowError: the chat template refuses what it answers.
        """
        return beside(lambda: self._follow(self._talks[index], turn))

    def _follow(self, talk: _Talk, turn: Completion) -> Request | None:
        owner = self._owner
        said = self._said(talk, turn)
        talk.say(turn)
        talk.messages.append(Message("assistant", said))
        number = len(talk.turns)
        last = number == owner.environments.config.max_turns
        answer = self._answer(talk, Turn(said, turn.stop_reason, number, last=last))
        if answer is None:
            return None
        talk.add(answer)
        if isinstance(answer, End):
            return None
        observed = self._observed(talk, turn, answer.messages)
        room = owner.sampling.max_new_tokens - len(talk.token_ids) - len(observed)
        talk.truncated = last or room < 1
        if talk.truncated:
            return None
        talk.observe(observed, answer.messages)
        return replace(
            talk.first,
            prompt_ids=(*talk.first.prompt_ids, *talk.token_ids),
            seed=completion_seed(talk.first.seed, talk.prompt.id, number),
            max_new_tokens=owner.longest_turn(room),
        )

    def _said(self, talk: _Talk, turn: Completion) -> str:
        """The text of a turn, with special tokens: some templates mark calls of tools by them."""
        renderer = self._owner.renderer
        spoken = turn.token_ids[:-1] if turn.token_ids[-1] in renderer.stop_ids else turn.token_ids
        text: str = renderer.tokenizer.decode(spoken, skip_special_tokens=False)
        return cut(text, talk.first.stop or self._owner.sampling.stop)

    def _answer(self, talk: _Talk, turn: Turn) -> Observation | End | None:
        """What the environment says; None if it fails, which ends the conversation."""
        owner, environments = self._owner, self._owner.environments

        def reply() -> Observation | End:
            if talk.environment is None:
                talk.environment = environments.make(talk.prompt, talk.first.seed)
            return _checked(talk.environment.reply(turn))

        try:
            with owner.slots:
                answer = beside(reply).result(environments.config.timeout)
        except Exception as error:
            talk.failure = reason_of(error)
            return None
        if answer.reward is not None and not owner.rewarded:
            fix = 'Add --reward environment (or [[rewards]] with name = "environment"; weight = 0.0 only measures it).'
            raise ConfigError("The environment gives rewards, which this run does not read.", where="rewards", fix=fix)
        return answer

    def _observed(self, talk: _Talk, turn: Completion, messages: Sequence[Message]) -> list[int]:
        renderer, prompt = self._owner.renderer, talk.prompt
        stopped = turn.token_ids[-1] in renderer.stop_ids
        tools = self._owner.environments.tools
        found = renderer.observation(prompt.content, messages, prompt.source, tools, stopped=stopped)
        ids: list[int] = found.tolist()
        return ids


def _checked(answer: Any) -> Observation | End:
    """What an environment answered, with its numbers as numbers.

    Raises:
        TypeError: it is neither an observation of messages nor an end.
        ValueError: a number is not finite.
    """
    if not isinstance(answer, Observation | End):
        raise TypeError(f"reply returned {type(answer).__name__}, not Observation or End")
    if isinstance(answer, Observation) and not all(isinstance(message, Message) for message in answer.messages):
        raise TypeError("an observation is a tuple of Message(role, content)")
    reward = None if answer.reward is None else float(answer.reward)
    parts = {str(name): float(value) for name, value in answer.parts.items()}
    if not all(math.isfinite(value) for value in (*parts.values(), reward or 0.0)):
        raise ValueError("a reward or part is not finite")
    return replace(answer, reward=reward, parts=parts)
