"""Environments: what answers the policy between its turns. Tools, and classes of one's own."""

from collections.abc import Mapping
from typing import Any

from accord.environments import tools
from accord.environments.base import (
    ENVIRONMENTS,
    End,
    Environment,
    EnvironmentConfig,
    EnvironmentKind,
    Environments,
    Observation,
    Turn,
)
from accord.environments.custom import CustomEnvironmentConfig, custom
from accord.environments.tools import TOOLS
from accord.errors import ConfigError

_BUILT_IN = (tools,)  # importing it registers what it holds

__all__ = [
    "ENVIRONMENTS",
    "TOOLS",
    "End",
    "Environment",
    "EnvironmentConfig",
    "EnvironmentKind",
    "Environments",
    "Observation",
    "Turn",
    "environments_of",
]


def environments_of(settings: Mapping[str, Any], tokenizer: Any) -> Environments:
    """The environment that a table [environment] names.

    Args:
        tokenizer: the policy's; its chat template decides how tools are called.

    Raises:
        ConfigError: a setting is wrong, or the environment cannot be made.
    """
    name = settings.get("name")
    if not isinstance(name, str):
        fix = 'Write e.g. name = "tools", or name = "./game.py:Game".'
        raise ConfigError("An environment without a name.", where="[environment]", fix=fix)
    kind = EnvironmentKind(CustomEnvironmentConfig, custom) if ":" in name else ENVIRONMENTS[name]
    return kind.build(kind.config.build(dict(settings), f"[environment] ({name})"), tokenizer)
