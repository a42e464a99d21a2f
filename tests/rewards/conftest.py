"""Prompts and completions from plain texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from accord.rewards import REWARDS, Failed
from accord.types import Completion, Prompt

Single = Callable[..., Any]


def make_completion(text: str, tokens: int = 3) -> Completion:
    zeros = (0.0,) * tokens
    return Completion("p", text, tuple(range(tokens)), zeros, zeros, "stop", temperature=1.0, seed=0)


@pytest.fixture(scope="session")
def completion() -> Callable[..., Completion]:
    return make_completion


@pytest.fixture(scope="session")
def say() -> Single:
    """`say("length", "one two", max=5)`: what a reward says of one text; a failure as its reason."""

    def one(name: str, text: str, *, answer: str | None = None, tokens: int = 3, requirements: tuple = (), **settings):
        kind = REWARDS[name]
        config = kind.config.build({"name": name, **settings})
        prompt = Prompt("p", "question", requirements, answer=answer)
        (outcome,) = kind.build(config, None)([prompt], [make_completion(text, tokens)])
        return outcome.reason if isinstance(outcome, Failed) else outcome

    return one
