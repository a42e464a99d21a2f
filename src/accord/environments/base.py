"""What an environment is: it answers the policy's turns until it ends the conversation. No torch here.

One is made for every rollout, from the prompt's record and a seed. One that raises or takes too long is data: the
rollout ends, its reward is missing, and that is counted and shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import Field

from accord.config import Config
from accord.registry import Registry
from accord.types import Message, Prompt, StopReason

__all__ = [
    "ENVIRONMENTS",
    "End",
    "Environment",
    "EnvironmentConfig",
    "EnvironmentKind",
    "Environments",
    "Observation",
    "Turn",
]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy said: its text without the stop token, special tokens written out.

    `number` counts from 1. `stop_reason` is `length` where the limit of tokens has cut it. `last` says that the limit
    of turns is reached: an observation would not be seen any more.

    Example: ``Turn("Is it 7?", "stop", 1, last=False)``
    """

    text: str
    stop_reason: StopReason
    number: int
    last: bool


@dataclass(frozen=True, slots=True)
class Observation:
    """What the policy sees next. Rewards and parts of all turns are added up.

    A conversation that a limit ends has the sum of its rewards so far, 0 if there were none.

    Example: ``Observation((Message("user", "Lower."),), parts={"guesses": 1})``
    """

    messages: tuple[Message, ...]
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class End:
    """The conversation is over. Where no turn gave a reward, other `[[rewards]]` say what it is worth.

    Example: ``End(1.0, {"guesses": 1})``
    """

    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """Any class whose objects have this method will do; it is called as ``Class(prompt, seed, **options)``.

    JSON schemas in its attribute `tools`, if it has one, are shown to the policy by the chat template.
    """

    def reply(self, turn: Turn) -> Observation | End:
        """Answer a turn of the policy."""


class EnvironmentConfig(Config):
    """What every [environment] may say."""

    name: str
    """A built-in environment, or a Python class: `package.module:Class` or `./file.py:Class`."""
    max_turns: int = Field(8, gt=0)
    """Turns of the policy after which a conversation ends."""
    max_turn_tokens: int | None = Field(None, gt=0)
    """Longest turn of the policy; `sampling.max_new_tokens` limits the whole conversation after the prompt, with what
    the environment says (default: no limit but that)."""
    timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Seconds for one answer; after them the rollout ends without a reward. Python cannot stop the call: it goes on
    beside the run."""


@dataclass(frozen=True, slots=True)
class Environments:
    """An environment under checked settings.

    Attributes:
        make: a new one for a rollout, from the prompt's record and a seed.
        role: the role of what it is expected to answer with: the chat template is tried with it.
        tools: JSON schemas that the policy is shown with the prompt.
    """

    config: EnvironmentConfig
    make: Callable[[Prompt, int], Environment]
    role: str = "user"
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class EnvironmentKind:
    """A row of the registry: settings, and what makes environments of them; the second argument is the tokenizer."""

    config: type[EnvironmentConfig]
    build: Callable[[Any, Any], Environments]


ENVIRONMENTS: Registry[EnvironmentKind] = Registry("environment", "accord.environments")
