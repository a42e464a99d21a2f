"""How a chat template writes a call of a tool, found out by letting it write one, and calls read from what was said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accord.errors import ChatTemplateError

__all__ = ["Call", "CallFormat", "call_format"]

_NAME, _ARGUMENTS = "a_tool", {"an_argument": "a value"}
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks inside of strings


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; with `problem` it cannot be read.

    Example: ``Call("calculator", {"expression": "2 + 2"})``
    """

    name: str
    arguments: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """JSON objects (or a list of them) with these keys, behind `marker`; without a marker they begin the text.

    Example: ``CallFormat("<tool_call>", "name", "arguments")``
    """

    marker: str
    name: str
    arguments: str

    def calls(self, text: str) -> list[Call]:
        """The calls in a text, in order."""
        if self.marker:
            return [call for piece in text.split(self.marker)[1:] for call in self._read(piece)]
        return self._read(text) if text.lstrip().startswith(("{", "[")) else []

    def _read(self, piece: str) -> list[Call]:
        try:
            value, _ = _DECODER.raw_decode(piece.lstrip())
        except (ValueError, RecursionError) as error:
            return [Call("", {}, f"the call is no JSON: {error}")]
        return [self._call(each) for each in (value if isinstance(value, list) else [value])]

    def _call(self, value: Any) -> Call:
        name = value.get(self.name) if isinstance(value, dict) else None
        arguments = value.get(self.arguments, {}) if isinstance(value, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return Call("", {}, f'a call is {{"{self.name}": "…", "{self.arguments}": {{…}}}}')
        return Call(name, arguments)


def call_format(tokenizer: Any) -> CallFormat:
    """The format in which the tokenizer's chat template writes calls.

    Raises:
        ChatTemplateError: there is no template, it refuses calls, or it does not write them as JSON.
    """
    fix = "Use a model that was trained with tools, or --set chat_template=PATH_OF_A_JINJA_FILE; see docs/online.md"
    asked = {"role": "user", "content": "Hello."}
    call = {"type": "function", "id": "call00000", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        start = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template([asked, said], tokenize=False)
    except Exception as error:  # a template may raise anything; without one transformers does
        what = f"The chat template cannot write a call of a tool: {str(error).splitlines()[0]:.200}"
        raise ChatTemplateError(what, fix=fix) from None
    rest = text.removeprefix(start)
    for at in (at for at, character in enumerate(rest) if character in "{["):
        try:
            value, _ = _DECODER.raw_decode(rest, at)
        except ValueError:
            continue
        value = value[0] if isinstance(value, list) and value else value
        keys = {repr(v): k for k, v in value.items()} if isinstance(value, dict) else {}
        if repr(_NAME) in keys and repr(_ARGUMENTS) in keys:
            before = rest[:at].split()
            return CallFormat(before[-1] if before else "", keys[repr(_NAME)], keys[repr(_ARGUMENTS)])
    raise ChatTemplateError("The chat template does not write calls of tools as JSON.", fix=fix)
