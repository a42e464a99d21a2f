"""Rewards that a rule decides; expected values follow from the definition in each docstring."""

from __future__ import annotations

import json

import pytest

from accord.errors import ConfigError
from accord.rewards import REWARDS
from accord.types import Requirement


@pytest.mark.parametrize(
    ("text", "settings", "reward"),
    [
        ("It is blue", {"pattern": "blue"}, 1),
        ("It is BLUE", {"pattern": "blue"}, 0),
        ("It is BLUE", {"pattern": "(?i)blue"}, 1),
        ("It is blue", {"pattern": "blue", "whole": True}, 0),
        ("blue", {"pattern": "blue", "whole": True}, 1),
    ],
)
def test_regex(say, text, settings, reward):
    assert say("regex", text, **settings) == reward


def test_a_pattern_that_takes_for_ever_is_a_timeout(say):
    assert say("regex", "a" * 40 + "!", pattern=r"^(?:a|a|aa)+$") == "timeout"


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("schema") / "person.json"
    path.write_text(json.dumps({"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}))
    return str(path)


@pytest.mark.parametrize(
    ("text", "any_json", "person"),
    [
        ('{"age": 3}', 1, 1),
        ('```json\n{"age": 3}\n```', 1, 1),
        ('{"age": "3"}', 1, 0),
        ("[]", 1, 0),
        ('{"age": 3', 0, 0),
        ('Here: {"age": 3}', 0, 0),
        ("NaN", 0, 0),
        ("[" * 100_000, 0, 0),
        ("", 0, 0),
    ],
)
def test_json_schema(say, schema, text, any_json, person):
    assert say("json_schema", text) == any_json
    assert say("json_schema", text, schema_file=schema) == person


def test_a_schema_that_points_elsewhere_is_not_downloaded(say, tmp_path):
    path = tmp_path / "remote.json"
    path.write_text('{"$ref": "http://127.0.0.1:9/schema.json"}')
    assert "Unresolvable" in say("json_schema", "{}", schema_file=str(path))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot be read"), ("{", "not JSON"), ('{"type": "objekt"}', "Not a valid schema")],
)
def test_a_wrong_schema_is_an_error_before_anything_is_sampled(tmp_path, content, complaint):
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content)
    kind = REWARDS["json_schema"]
    with pytest.raises(ConfigError, match=complaint):
        kind.build(kind.config.build({"name": "json_schema", "schema_file": str(path)}), None)


@pytest.mark.parametrize(
    ("count", "settings", "reward"),
    [
        (10, {"max": 10}, 1),
        (15, {"max": 10}, 0.5),
        (20, {"max": 10}, 0),
        (30, {"max": 10}, 0),
        (11, {"max": 10, "slope": 4}, 0.75),
        (5, {"min": 10}, 0.5),
        (0, {"min": 10}, 0),
        (7, {"min": 5, "max": 9}, 1),
    ],
)
def test_length_falls_linearly_outside_its_range(say, count, settings, reward):
    assert say("length", "word " * count, **settings) == pytest.approx(reward)
    assert say("length", "x" * count, unit="characters", **settings) == pytest.approx(reward)
    assert say("length", "whatever", unit="tokens", tokens=count, **settings) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>2+2</think><answer>4</answer>", 1),
        (" <think>\n2+2\n</think>\n\n<answer>4</answer>\n", 1),
        ("<answer>4</answer><think>2+2</think>", 0),
        ("<think>2+2</think>", 0),
        ("<think>2+2</think><answer>4", 0),
        ("<think> </think><answer>4</answer>", 0),
        ("<think>2+2</think>so<answer>4</answer>", 0),
        ("<think>2+2</think><answer>4</answer>!", 0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0),
        ("<think><answer>4</answer></think>", 0),
        ("", 0),
    ],
)
def test_tags(say, text, reward):
    assert say("format", text, tags=["think", "answer"]) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("## A\none\n## B\ntwo", 1),
        ("Intro\n\n## A\none\n\n## B\ntwo\n", 1),
        ("## B\ntwo\n## A\none", 0),
        ("## A\n## B\ntwo", 0),
        ("## A\none\n## B\n", 0),
        ("## A\none", 0),
        ("see ## A\none\n## B\ntwo", 0),
    ],
)
def test_headings(say, text, reward):
    assert say("format", text, headings=["## A", "## B"]) == reward


def test_requirements_are_the_share_that_is_met(say):
    wanted = (Requirement("max_words", {"count": 2}), Requirement("contains", {"keyword": "blue"}))
    assert say("requirements", "blue", requirements=wanted) == 1
    assert say("requirements", "green", requirements=wanted) == 0.5
    assert say("requirements", "a very long green", requirements=wanted) == 0
    assert say("requirements", "blue") == "the prompt has no requirements"


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("regex", {}, "pattern: this setting is required"),
        ("length", {}, "give min, max or both"),
        ("length", {"min": 3, "max": 2}, "min is above max"),
        ("format", {}, "tags or headings"),
        ("format", {"tags": ["a"], "headings": ["b"]}, "tags or headings"),
        ("format", {"tags": ["a", "a"]}, "must differ"),
        ("requirements", {"clip": [1.0, 0.0]}, "low must be below high"),
        ("requirements", {"weight": float("nan")}, "finite"),
        ("requirements", {"wieght": 1.0}, "Did you mean 'weight'"),
    ],
)
def test_wrong_settings(name, settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        REWARDS[name].config.build({"name": name, **settings})
