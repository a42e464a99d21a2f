"""Tools: what a model reads of a function, calls in the formats of real chat templates, and what is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from accord.environments import End, Environments, Observation, Turn, environments_of
from accord.environments.calls import Call, CallFormat, call_format
from accord.environments.functions import calculator, python
from accord.environments.tools import tool_of
from accord.errors import AccordError, ChatTemplateError, ConfigError
from accord.models.tiny import tiny_tokenizer
from accord.types import Message, Prompt

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PROMPT = Prompt("p", (Message("user", "What is 6 times 7?"),))


def tokenizer(name: str):
    return tiny_tokenizer(chat_template=(TEMPLATES / f"{name}.jinja").read_text())


def turn(text: str) -> Turn:
    return Turn(text, "stop", 1, last=False)


def environment(**settings) -> Environments:
    return environments_of({"name": "tools", "tools": ["calculator"], **settings}, tokenizer("qwen2_5"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("qwen2_5", CallFormat("<tool_call>", "name", "arguments")),
        ("qwen3", CallFormat("<tool_call>", "name", "arguments")),
        ("llama3_1", CallFormat("", "name", "parameters")),
    ],
)
def test_a_template_shows_how_it_writes_calls(template, expected):
    """What the template writes of a call is read back as that call, and several of them in order."""
    own = tokenizer(template)
    format = call_format(own)
    assert format == expected
    arguments = {"expression": "6 * 7", "note": 'with "quotes" and\na line break', "deep": {"a": [1, None]}}
    call = {"type": "function", "function": {"name": "calculator", "arguments": arguments}}
    asked = [{"role": "user", "content": "Hello."}]
    text = own.apply_chat_template([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], tokenize=False)
    said = text.removeprefix(own.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    assert format.calls(said) == [Call("calculator", arguments)]
    if format.marker:
        assert format.calls(f"Let me see.\n{said}{said}") == [Call("calculator", arguments)] * 2
    assert format.calls("The answer is 42.") == []


@pytest.mark.parametrize("template", ["gemma", "lfm2"])
def test_a_template_that_writes_no_json_calls_is_refused(template):
    with pytest.raises(ChatTemplateError, match="call"):
        call_format(tokenizer(template))


@given(st.text(max_size=60))
def test_any_text_is_read_without_an_exception(text):
    for marker in ("", "<tool_call>"):
        calls = CallFormat(marker, "name", "arguments").calls(f"{marker}{text}")
        assert all(call.problem or call.name is not None for call in calls)


def test_calls_are_answered_in_order_and_errors_told():
    tools = environment(max_output=5).make(PROMPT, 0)
    calls = [
        {"name": "calculator", "arguments": {"expression": "6 * 7"}},
        {"name": "calculator", "arguments": {"expression": "import os"}},
        {"name": "calculator", "arguments": {"expresion": "1"}},
        {"name": "search", "arguments": {}},
        {"name": "calculator", "arguments": {"expression": "1/3"}},
        {"name": "calculator", "arguments": {"expression": "1/0"}},
    ]
    text = "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    answer = tools.reply(turn(f"{text}<tool_call>{{oops}}</tool_call>"))
    assert isinstance(answer, Observation)
    assert {message.role for message in answer.messages} == {"tool"}
    first, syntax, argument, unknown, long, zero, no_json = (message.content for message in answer.messages)
    assert first == "42"
    assert syntax == "Error: this is no arithmetic expression"
    assert argument.startswith("Error: expression: Field required")
    assert unknown == "Error: there is no tool 'search'. Known: calculator."
    assert long == "0.333 …"
    assert zero == "Error: ZeroDivisionError: division by zero"
    assert no_json.startswith("Error: the call is no JSON")
    assert answer.parts == {"tool_calls": 7, "tool_errors": 5}
    assert tools.reply(turn("It is 42.")) == End()


def test_a_function_is_described_by_its_types_and_its_docstring():
    def look_up(
        word: Annotated[str, Field(description="What to look for.")],
        most: int = 3,
        order: Literal["new", "old"] = "new",
    ) -> list[str]:
        """Look up a word."""
        return [word] * most + [order]

    tool = tool_of(look_up)
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look up a word.",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "description": "What to look for."},
                    "most": {"type": "integer", "default": 3},
                    "order": {"type": "string", "enum": ["new", "old"], "default": "new"},
                },
                "required": ["word"],
                "additionalProperties": False,
            },
        },
    }
    assert tool({"word": "é", "most": 1}) == '["é", "new"]'
    for wrong in ({"word": "a", "most": "many"}, {"word": "a", "order": "up"}, {"word": "a", "title": 1}, {}):
        with pytest.raises(ValueError, match=":"):
            tool(wrong)


def test_a_function_that_cannot_be_called_by_a_model_is_refused():
    def untyped(word):
        return word

    def many(*words: str):
        return words

    def opaque(place: Path | object()):  # type: ignore[valid-type]
        return place

    for function in (untyped, many, opaque):
        with pytest.raises(ConfigError, match=f"The tool {function.__name__} cannot be called"):
            tool_of(function)


@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from(["+", "-", "*", "//", "%"]))
def test_the_calculator_agrees_with_python(a, b, sign):
    expression = f"({a}) {sign} ({b})"
    if b == 0 and sign in ("//", "%"):
        with pytest.raises(ZeroDivisionError):
            calculator(expression)
    else:
        assert calculator(expression) == str(eval(expression))


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 ** 10", "1024"), ("sqrt(16) + max(1, 2)", "6"), ("7 / 2", "3.5"), ("round(pi, 2)", "3.14"), ("-2 ** 2", "-4")],
)
def test_the_calculator_knows_powers_and_functions(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "x", "__import__('os')", "'a' * 9", "9 ** 9 ** 9", "10 ** 100000", "(-8) ** 0.5", "True", "(1,)", "1;2"],
)
def test_the_calculator_refuses_everything_else(expression):
    with pytest.raises(ValueError, match=r"no arithmetic expression|too large"):
        calculator(expression)


def test_python_answers_what_is_printed_and_the_last_value():
    assert python("import math\nfor i in range(3):\n    print(i)\nmath.factorial(5)") == "0\n1\n2\n120"
    assert python("x = 1") == ""
    assert python("1 / 0") == "ZeroDivisionError: division by zero"
    assert python("1 +").startswith("SyntaxError")
    assert "PermissionError" in python("open('/tmp/accord-was-here', 'w')")
    assert not Path("/tmp/accord-was-here").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "without a name"),
        ({"name": "tool"}, "Did you mean 'tools'"),
        ({"name": "tools"}, "tools"),
        ({"name": "tools", "tools": ["calculater"]}, "Did you mean 'calculator'"),
        ({"name": "tools", "tools": ["calculator", "calculator"]}, "same name"),
        ({"name": "tools", "tools": ["no.such.module:f"]}, "cannot be imported"),
        ({"name": "tools", "tools": ["calculator"], "max_turn": 3}, "max_turns"),
        ({"name": "accord.environments:Nothing"}, "has no class 'Nothing'"),
        ({"name": "accord.types:Message"}, "no method `reply`"),
        ({"name": "accord.environments.tools:ToolUse", "options": {"a": 1}}, "cannot be made"),
    ],
)
def test_wrong_settings_are_errors_that_say_what_to_do(settings, message):
    with pytest.raises(AccordError, match=message) as caught:
        environments_of(settings, tokenizer("qwen2_5"))
    assert caught.value.fix
