"""What a reward is: a function of a batch, its settings, and its row in `REWARDS`. No torch here.

A reward function is given prompts and completions, one for one, and answers a number for each, or None or a `Failed`
where it has none to give. That is data, counted and shown; it is never an error and never a silent 0.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

import regex
from pydantic import AfterValidator, Field, model_validator

from accord.config import Config
from accord.registry import Registry
from accord.types import Completion, Prompt

__all__ = [
    "REWARDS",
    "Failed",
    "Outcome",
    "Pattern",
    "RewardConfig",
    "RewardFunction",
    "RewardKind",
    "beside",
    "concurrently",
    "find_last",
    "matches",
    "outcome_of",
    "pointwise",
    "reason_of",
]

_REGEX_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a completion got no reward: what kind of failure, and after a colon what is special to this one.

    Example: ``Failed("HTTP error: 503 Service Unavailable")``
    """

    reason: str


Outcome = float | None | Failed
"""What a reward function says of one completion."""

RewardFunction = Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[Outcome]]
"""One outcome per completion, in order; prompt k belongs to completion k."""


class RewardConfig(Config):
    """What every entry of `[[rewards]]` may say."""

    name: str
    """A built-in reward, or a Python function: `package.module:function` or `./file.py:function`."""
    label: str | None = None
    """The name in metrics (default: the name; of a Python function, the function's). Two entries need two labels."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """What the reward is multiplied by in the sum. 0: measured, and without effect."""
    clip: tuple[float, float] | None = None
    """Bounds that the reward is cut to, before it is normalised."""
    normalise: Literal["none", "batch", "running"] = "none"
    """Subtract the mean and divide by the standard deviation + 1e-4: of the batch, or of everything seen so far."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError("clip is [low, high], and low must be below high")
        return self


A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C", bound=RewardConfig)


@dataclass(frozen=True, slots=True)
class RewardKind:
    """A row of the registry.

    Attributes:
        config: its settings.
        build: the reward function of such settings; the second argument is the policy's tokenizer, or None. Whatever
            can be wrong with the settings is an error here, before anything is trained.
        needs: what every prompt must have.
        waits: whether it waits for other processes more than it computes; such rewards run beside the others.

    Example: ``RewardKind(LengthConfig, pointwise(length))``
    """

    config: type[RewardConfig]
    build: Callable[[Any, Any], RewardFunction]
    needs: Literal["answer", "requirements"] | None = None
    waits: bool = False


REWARDS: Registry[RewardKind] = Registry("reward", "accord.rewards")


def pointwise(function: Callable[[C, Prompt, Completion], Outcome]) -> Callable[[C, Any], RewardFunction]:
    """Build a reward that looks at one completion at a time; an exception fails that completion alone."""

    def build(config: C, _tokenizer: Any) -> RewardFunction:
        def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Outcome]:
            return [_attempt(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

        def _attempt(prompt: Prompt, completion: Completion) -> Outcome:
            try:
                return function(config, prompt, completion)
            except Exception as error:
                return Failed(reason_of(error))

        return reward

    return build


def beside(function: Callable[[], B]) -> Future[B]:
    """Start a function in a thread of its own; Ctrl-C ends the program without waiting for it."""
    future: Future[B] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def concurrently(function: Callable[[A], B], items: Sequence[A], workers: int) -> list[B]:
    """`function` of every item, in order, at most `workers` at once, each in a thread."""
    results: dict[int, B] = {}
    turns, lock = iter(range(len(items))), threading.Lock()

    def take() -> int | None:
        with lock:
            return next(turns, None)

    def work() -> None:
        while (turn := take()) is not None:
            results[turn] = function(items[turn])

    for future in [beside(work) for _ in range(min(workers, len(items)))]:
        future.result()
    return [results[turn] for turn in range(len(items))]


def reason_of(error: BaseException) -> str:
    """An exception as a reason.

    Example:
        >>> reason_of(ValueError("not a date"))
        'ValueError: not a date'
    """
    if isinstance(error, TimeoutError):
        return "timeout"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def outcome_of(value: Any) -> Outcome:
    """What a reward function returned for one completion, checked.

    Raises:
        TypeError: it is no number, None or `Failed`.
    """
    if value is None:
        return Failed("none returned")
    if isinstance(value, Failed):
        return value
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r:.40}")
    number = float(value)
    return number if math.isfinite(number) else Failed("not a number" if math.isnan(number) else "infinite")


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression; matching ends after a second, whatever the text."""


def find_last(pattern: str, text: str) -> str | None:
    """The first group (without groups: the whole) of the last match, or None.

    Raises:
        TimeoutError: the text makes the pattern take more than a second.
    """
    found = None
    for found in regex.finditer(pattern, text, timeout=_REGEX_SECONDS):  # noqa: B007
        pass
    if found is None:
        return None
    group: str | None = found[1] if found.re.groups else found[0]
    return group


def matches(pattern: str, text: str, *, whole: bool) -> bool:
    """Whether the pattern matches the whole text, or somewhere in it.

    Raises:
        TimeoutError: the text makes the pattern take more than a second.
    """
    search = regex.fullmatch if whole else regex.search
    return search(pattern, text, timeout=_REGEX_SECONDS) is not None
