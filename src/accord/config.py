"""Settings: frozen, strict, TOML in and out. An unknown key is an error with "did you mean"."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_json

from accord.errors import ConfigError, unknown_name

__all__ = ["Config", "dump_toml", "flatten", "merge", "parse_assignments", "read_template", "read_toml"]


class Config(BaseModel):
    """Base of every settings class: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "settings") -> Self:
        """Validate a (nested) mapping; raise one ConfigError that names every wrong key."""
        try:
            # By way of JSON: strict, yet a TOML array fills a tuple and a string fills a path.
            return cls.model_validate_json(to_json(dict(values), inf_nan_mode="constants"))
        except ValidationError as error:
            problems = [_problem(cls, detail) for detail in error.errors()]
            fix = "Correct it, or leave it out where it has a default."
            raise ConfigError("; ".join(problems), where=where, fix=fix) from None

    def to_toml(self) -> str:
        """The settings as TOML that `build` reads back to an equal object (None is left out)."""
        return dump_toml(self.model_dump(exclude_none=True))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; a missing or broken one is a ConfigError with the place."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "Check the path given to --config."
        raise ConfigError("No such configuration file.", where=str(path), fix=fix) from None
    except OSError as error:
        fix = "Give --config a TOML file that you may read."
        raise ConfigError(f"Cannot read this: {error.strerror}.", where=str(path), fix=fix) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fix = "See https://toml.io for the syntax."
        raise ConfigError(f"Not valid TOML: {error}.", where=str(path), fix=fix) from None


def read_template(path: str | None) -> str | None:
    """The text of the chat template that a setting names; None for none. One that cannot be read is a ConfigError."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        fix = "Give the path of a Jinja file."
        raise ConfigError("Cannot read this file.", where=f"chat_template = {path}", fix=fix) from None


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``["beta=0.1", "optimizer.learning_rate=1e-5"]`` into a nested mapping; values are TOML, else strings."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(part.isidentifier() for part in key.strip().split(".")):
            fix = "Write --set key=value, e.g. --set beta=0.2"
            raise ConfigError(f"Cannot read {assignment!r}.", where="--set", fix=fix)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        node = values
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise _contradiction(assignment)
        if isinstance(node.get(leaf), dict):
            raise _contradiction(assignment)
        node[leaf] = value
    return values


def _contradiction(assignment: str) -> ConfigError:
    fix = "Give the whole setting or its parts, not both."
    return ConfigError(f"{assignment!r} contradicts an earlier --set.", where="--set", fix=fix)


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; later layers win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name: ``{"loss": {"beta": 0.1}}`` becomes ``{"loss.beta": 0.1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def dump_toml(values: Mapping[Any, Any], prefix: str = "") -> str:
    """Write scalars, lists and nested tables as TOML; a key that is a number becomes the name of that number."""
    scalars = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in scalars.items()]
    text = "\n".join(lines) + ("\n" if lines else "")
    for key, table in tables.items():
        name = f"{prefix}{_toml_key(key)}"
        text += f"\n[{name}]\n" + dump_toml(table, prefix=f"{name}.")
    return text


def _toml_key(key: Any) -> str:
    key = str(key)
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key)


def _toml_string(text: str) -> str:
    # JSON's escapes are TOML's, save that TOML also wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return _toml_string(str(value))


def _problem(cls: type[BaseModel], detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return unknown_name("setting", key, [".".join([*path[:-1], name]) for name in _fields(cls, path[:-1])])
    if detail["type"] == "missing":
        return f"{key}: this setting is required"
    return f"{key}: {detail['msg']} (got {detail['input']!r})"


def _fields(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = cls.model_fields[part].annotation
        sections = [
            choice
            for choice in get_args(annotation) or (annotation,)
            if isinstance(choice, type) and issubclass(choice, BaseModel)
        ]
        if not sections:
            return []
        cls = sections[0]
    return sorted(cls.model_fields)
