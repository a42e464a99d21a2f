"""Any Python class as an environment, by import path: `package.module:Class`, or `./file.py:Class`."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import Field

from accord.environments.base import EnvironmentConfig, Environments
from accord.errors import ConfigError
from accord.rewards.custom import import_callable

__all__ = ["CustomEnvironmentConfig", "custom"]


class CustomEnvironmentConfig(EnvironmentConfig):
    """Settings of a Python class."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Named arguments for every object, behind prompt and seed."""


def custom(config: CustomEnvironmentConfig, _tokenizer: Any) -> Environments:
    """The class that `name` names.

    Raises:
        ConfigError: it cannot be imported, cannot be called as ``Class(prompt, seed, **options)``, or cannot reply.
    """
    where = f"environment, {config.name}"
    define = "Define it: class Name, with __init__(self, prompt, seed) and reply(self, turn)."
    made: Any = import_callable(config.name, "class", "environment", define)
    if not callable(getattr(made, "reply", None)):
        raise ConfigError("It has no method `reply`.", where=where, fix=define)
    try:
        inspect.signature(made).bind(None, 0, **config.options)
    except TypeError as error:
        fix = "Mend environment.options, or the class's __init__(self, prompt, seed, …)."
        raise ConfigError(f"It cannot be made: {error}.", where=where, fix=fix) from None
    tools = tuple(getattr(made, "tools", ()))
    return Environments(
        config, lambda prompt, seed: made(prompt, seed, **config.options), "tool" if tools else "user", tools
    )
