"""`tools`: Python functions that the policy may call, in the format of its chat template, until it answers without."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from accord.environments.base import (
    ENVIRONMENTS,
    End,
    EnvironmentConfig,
    EnvironmentKind,
    Environments,
    Observation,
    Turn,
)
from accord.environments.calls import Call, CallFormat, call_format
from accord.environments.functions import calculator, python
from accord.errors import ConfigError
from accord.registry import Registry
from accord.rewards.base import reason_of
from accord.rewards.custom import import_callable
from accord.types import Message

__all__ = ["TOOLS", "Tool", "ToolUse", "ToolsConfig", "tool_of", "tools"]

TOOLS: Registry[Callable[..., Any]] = Registry("tool", "accord.tools")
TOOLS.add("calculator", calculator)
TOOLS.add("python", python)


class ToolsConfig(EnvironmentConfig):
    """Settings of `tools`."""

    tools: tuple[str, ...] = Field(min_length=1)
    """Built-in tools, and Python functions: `package.module:function` or `./file.py:function`."""
    max_output: int = Field(2000, gt=0)
    """Characters of a tool's answer; longer ones lose their end."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function, and the model of its arguments.

    Example: ``tool_of(calculator)("expression")``
    """

    function: Callable[..., Any]
    arguments: type[BaseModel]

    @property
    def schema(self) -> dict[str, Any]:
        """What chat templates show of it."""
        parameters = _untitled(self.arguments.model_json_schema())
        description = inspect.cleandoc(self.function.__doc__ or "")
        function = {"name": self.function.__name__, "description": description, "parameters": parameters}
        return {"type": "function", "function": function}

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """What the function returns, as text; JSON of what is none.

        Raises:
            ValueError: the arguments are not those of the function.
        """
        try:
            checked = self.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        value = self.function(**{name: getattr(checked, name) for name in self.arguments.model_fields})
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def tool_of(function: Callable[..., Any], where: str = "environment.tools") -> Tool:
    """A function with types for all its arguments as a tool; its docstring is what the policy reads about it.

    Raises:
        ConfigError: an argument has no type, or none that JSON has.
    """
    name = getattr(function, "__name__", repr(function))
    try:
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"{parameter} cannot be given by name")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (hints[parameter.name], default)
        tool = Tool(function, create_model(name, __config__=ConfigDict(extra="forbid"), **fields))
        tool.schema  # noqa: B018  (types that JSON does not have are an error here)
    except Exception as error:
        reason = f"{error} has no type" if isinstance(error, KeyError) else reason_of(error)
        fix = "Give every argument a name and a type: def look_up(word: str, most: int = 3) -> str."
        raise ConfigError(f"The tool {name} cannot be called by a model: {reason}.", where=where, fix=fix) from None
    return tool


class ToolUse:
    """Answers every call of a turn with a message of the role `tool`; a turn without calls ends the conversation."""

    def __init__(self, tools: Mapping[str, Tool], format: CallFormat, max_output: int) -> None:
        self.tools, self.format, self.max_output = tools, format, max_output

    def reply(self, turn: Turn) -> Observation | End:
        """Run what the turn calls, in order. A tool that raises is told so, and counted."""
        calls = self.format.calls(turn.text)
        if not calls:
            return End()
        answers = [self._answer(call) for call in calls]
        errors = sum(failed for _, failed in answers)
        messages = tuple(Message("tool", text) for text, _ in answers)
        return Observation(messages, parts={"tool_calls": len(calls), "tool_errors": errors})

    def _answer(self, call: Call) -> tuple[str, bool]:
        if call.problem:
            return f"Error: {call.problem}", True
        if call.name not in self.tools:
            return f"Error: there is no tool {call.name!r}. Known: {', '.join(self.tools)}.", True
        try:
            text = self.tools[call.name](call.arguments)
        except Exception as error:
            return f"Error: {error if type(error) is ValueError else reason_of(error)}", True
        return (text if len(text) <= self.max_output else f"{text[: self.max_output]} …"), False


def tools(config: ToolsConfig, tokenizer: Any) -> Environments:
    """The tools of these settings, for the model with this tokenizer.

    Raises:
        ConfigError: a tool cannot be found or called, or two have the same name.
        ChatTemplateError: the model's chat template does not write calls as JSON.
    """
    define = "Define it: def name(argument: str) -> str."
    functions = [
        import_callable(spec, "tool", "environment", define) if ":" in spec else TOOLS[spec] for spec in config.tools
    ]
    found = [tool_of(function) for function in functions]
    named = {tool.function.__name__: tool for tool in found}
    if len(named) < len(found):
        raise ConfigError(
            "Two tools have the same name.", where="environment.tools", fix="Rename one of the functions."
        )
    format = call_format(tokenizer)
    schemas = tuple(tool.schema for tool in found)
    return Environments(config, lambda _prompt, _seed: ToolUse(named, format, config.max_output), "tool", schemas)


def _untitled(schema: Any) -> Any:
    """The schema without the titles that pydantic makes of names; they tell a model nothing."""
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [_untitled(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _untitled(each) for name, each in value.items()} if key == "properties" else _untitled(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


ENVIRONMENTS.add("tools", EnvironmentKind(ToolsConfig, tools))
