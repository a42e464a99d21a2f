"""Rewards that a program decides from the text: a pattern, JSON, length, sections, the prompt's own requirements."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import jsonschema
import referencing
from pydantic import Field, model_validator

from accord.data.requirements import met
from accord.errors import ConfigError
from accord.rewards.base import (
    REWARDS,
    Failed,
    Outcome,
    Pattern,
    RewardConfig,
    RewardFunction,
    RewardKind,
    matches,
    pointwise,
)
from accord.types import Completion, Prompt

__all__ = [
    "FormatConfig",
    "JsonSchemaConfig",
    "LengthConfig",
    "RegexConfig",
    "RequirementsConfig",
    "format_",
    "length",
    "regex_",
    "requirements",
]

_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*)\n```\s*\Z", re.DOTALL)


class RegexConfig(RewardConfig):
    """Settings of `regex`."""

    pattern: Pattern
    """The regular expression; `(?i)` at its start ignores case."""
    whole: bool = False
    """It must match the whole completion, not only a part of it."""


def regex_(config: RegexConfig, _prompt: Prompt, completion: Completion) -> Outcome:
    """1 if the pattern matches, else 0."""
    return float(matches(config.pattern, completion.text, whole=config.whole))


class JsonSchemaConfig(RewardConfig):
    """Settings of `json_schema`."""

    schema_file: Path | None = None
    """Path of a JSON Schema that the value must obey (default: any JSON is good)."""


def _json_schema(config: JsonSchemaConfig, tokenizer: Any) -> RewardFunction:
    validator = _validator(config.schema_file) if config.schema_file else None

    def valid(_config: JsonSchemaConfig, _prompt: Prompt, completion: Completion) -> Outcome:
        fenced = _FENCE.match(completion.text)
        try:
            value = json.loads(fenced[1] if fenced else completion.text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator is None or validator.is_valid(value))

    return pointwise(valid)(config, tokenizer)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _validator(path: Path) -> Any:
    fix = "Give a JSON Schema; https://json-schema.org explains it."
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except OSError as error:
        raise ConfigError(f"The schema cannot be read: {error.strerror}.", where=str(path), fix=fix) from None
    except ValueError as error:
        raise ConfigError(f"The schema is not JSON: {error}.", where=str(path), fix=fix) from None
    except jsonschema.SchemaError as error:
        raise ConfigError(f"Not a valid schema: {error.message}.", where=str(path), fix=fix) from None
    # A registry of its own: by default a $ref to another host would be downloaded.
    return kind(schema, registry=referencing.Registry())


class LengthConfig(RewardConfig):
    """Settings of `length`."""

    unit: Literal["words", "characters", "tokens"] = "words"
    """What is counted: words between white space, characters, or the sampler's tokens with the stop token."""
    min: int | None = Field(None, ge=1)
    """Fewer than this cost something."""
    max: int | None = Field(None, ge=1)
    """More than this cost something."""
    slope: int | None = Field(None, ge=1)
    """So far outside the range the reward has fallen from 1 to 0 (default: the limit itself, so 0 at twice `max`)."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self


def length(config: LengthConfig, _prompt: Prompt, completion: Completion) -> Outcome:
    """1 inside the range; outside it falls linearly to 0."""
    if config.unit == "tokens":
        count = completion.length
    else:
        count = len(completion.text.split() if config.unit == "words" else completion.text)
    if config.min is not None and count < config.min:
        outside, limit = config.min - count, config.min
    elif config.max is not None and count > config.max:
        outside, limit = count - config.max, config.max
    else:
        return 1.0
    return max(0.0, 1 - outside / (config.slope or limit))


class FormatConfig(RewardConfig):
    """Settings of `format`."""

    tags: tuple[str, ...] = ()
    """Sections in tags, e.g. `["think", "answer"]`: `<think>…</think><answer>…</answer>` and nothing outside them."""
    headings: tuple[str, ...] = ()
    """Lines that must stand in the text, e.g. `["## Summary", "## Details"]`."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        names = self.tags or self.headings
        if bool(self.tags) == bool(self.headings):
            raise ValueError("give tags or headings, one of the two")
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise ValueError("the names must differ and not be blank")
        return self


def format_(config: FormatConfig, _prompt: Prompt, completion: Completion) -> Outcome:
    """1 if every section is there once, in order and not blank, else 0."""
    if config.tags:
        return float(_in_tags(completion.text, config.tags))
    lines = [line.strip() for line in completion.text.splitlines()]
    if any(lines.count(heading.strip()) != 1 for heading in config.headings):
        return 0.0
    places = [*(lines.index(heading.strip()) for heading in config.headings), len(lines)]
    return float(all(any(lines[start + 1 : end]) for start, end in pairwise(places)))


def _in_tags(text: str, tags: tuple[str, ...]) -> bool:
    if any(text.count(mark) != 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>")):
        return False
    rest = text
    for tag in tags:
        before, _, rest = rest.partition(f"<{tag}>")
        inside, closed, rest = rest.partition(f"</{tag}>")
        if before.strip() or not closed or not inside.strip():
            return False
    return not rest.strip()


class RequirementsConfig(RewardConfig):
    """Settings of `requirements`: none of its own."""


def requirements(_config: RequirementsConfig, prompt: Prompt, completion: Completion) -> Outcome:
    """The share of the prompt's own requirements that the completion meets."""
    if not prompt.requirements:
        return Failed("the prompt has no requirements")
    answers = met(prompt.requirements, completion.text)
    return sum(answers) / len(answers)


REWARDS.add("regex", RewardKind(RegexConfig, pointwise(regex_)))
REWARDS.add("json_schema", RewardKind(JsonSchemaConfig, _json_schema))
REWARDS.add("length", RewardKind(LengthConfig, pointwise(length)))
REWARDS.add("format", RewardKind(FormatConfig, pointwise(format_)))
REWARDS.add("requirements", RewardKind(RequirementsConfig, pointwise(requirements), needs="requirements"))
