from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.config import Config, dump_toml, merge, parse_assignments, read_template, read_toml
from accord.errors import ConfigError


class Optimizer(Config):
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)


class Training(Config):
    steps: int
    beta: float = 0.1
    name: str = "run"
    kind: Literal["dpo", "ipo"] = "dpo"
    out: Path = Path("runs/x")
    limit: int | None = None
    optimizer: Optimizer = Optimizer()
    warmup: Optimizer | None = None


def test_build_fills_defaults_and_nested_tables():
    settings = Training.build({"steps": 3, "optimizer": {"learning_rate": 2e-5}})
    assert settings.steps == 3
    assert settings.optimizer == Optimizer(learning_rate=2e-5)
    assert settings.optimizer.betas == (0.9, 0.999)


def test_a_section_may_be_given_as_settings():
    assert Training.build({"steps": 1, "optimizer": Optimizer(learning_rate=1.0)}).optimizer.learning_rate == 1.0


def test_toml_arrays_and_strings_fill_tuples_and_paths():
    settings = Training.build(tomllib.loads('steps = 1\nout = "runs/y"\n[optimizer]\nbetas = [0.8, 0.9]\n'))
    assert settings.out == Path("runs/y")
    assert settings.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 1, "betta": 0.2}, "Unknown setting 'betta'. Did you mean 'beta'?"),
        (
            {"steps": 1, "optimizer": {"learning_rat": 1.0}},
            "Unknown setting 'optimizer.learning_rat'. Did you mean 'optimizer.learning_rate'?",
        ),
        (
            {"steps": 1, "warmup": {"learning_rat": 1.0}},
            "Unknown setting 'warmup.learning_rat'. Did you mean 'warmup.learning_rate'?",
        ),
        ({"steps": "3"}, "steps: Input should be a valid integer (got '3')"),
        ({"steps": 3.5}, "steps: Input should be a valid integer"),
        ({"steps": True}, "steps: Input should be a valid integer (got True)"),
        ({"steps": 1, "kind": "kto"}, "kind: Input should be 'dpo' or 'ipo' (got 'kto')"),
        ({}, "steps: this setting is required"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(values, sentence):
    with pytest.raises(ConfigError) as caught:
        Training.build(values, where="dpo.toml")
    assert str(caught.value).startswith("dpo.toml: ")
    assert sentence in str(caught.value)
    assert caught.value.fix


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        Training.build({"steps": "x", "betta": 1})
    assert "steps:" in str(caught.value)
    assert "'betta'" in str(caught.value)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Training(steps=1).steps = 2


finite = st.floats(allow_nan=False)


@given(
    steps=st.integers(-(2**63), 2**63 - 1),
    beta=finite,
    name=st.text(st.characters(codec="utf-8")),
    limit=st.none() | st.integers(0, 9),
    betas=st.tuples(finite, finite),
)
def test_settings_survive_toml(steps, beta, name, limit, betas):
    settings = Training(steps=steps, beta=beta, name=name, limit=limit, optimizer=Optimizer(betas=betas))
    assert Training.build(tomllib.loads(settings.to_toml())) == settings


scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | st.text(st.characters(codec="utf-8"))
keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
tables = st.recursive(
    st.dictionaries(keys, scalars | st.lists(scalars, max_size=3), max_size=4),
    lambda inner: st.dictionaries(keys, scalars | inner | st.lists(inner, max_size=2), max_size=4),
    max_leaves=12,
)


@given(tables)
def test_what_is_dumped_is_what_python_reads(values):
    """Oracle: the standard library's own TOML reader, over any keys, strings, numbers, arrays and nested tables."""
    assert tomllib.loads(dump_toml(values)) == values


def test_a_number_that_is_none_is_dumped_too():
    assert math.isnan(tomllib.loads(dump_toml({"x": math.nan}))["x"])


def test_later_layers_win_and_tables_are_merged():
    assert merge({"a": 1, "t": {"x": 1, "y": 2}}, {"t": {"y": 3}}, {"b": 4}) == {"a": 1, "b": 4, "t": {"x": 1, "y": 3}}
    assert merge({"t": {"x": 1}}, {"t": 5}) == {"t": 5}


def test_merge_leaves_its_layers_alone():
    first = {"t": {"x": 1}}
    merge(first, {"t": {"x": 2}})["t"]["x"] = 3
    assert first == {"t": {"x": 1}}


def test_assignments_are_read_as_toml_else_as_text():
    given = [
        "beta=0.2",
        "steps = 5",
        "lora=true",
        "optimizer.learning_rate=1e-5",
        "name=my run",
        "sizes=[1, 2]",
        'id="7"',
    ]
    assert parse_assignments(given) == {
        "beta": 0.2,
        "steps": 5,
        "lora": True,
        "optimizer": {"learning_rate": 1e-5},
        "name": "my run",
        "sizes": [1, 2],
        "id": "7",
    }


@pytest.mark.parametrize("assignment", ["beta", "=1", "a b=1", "a..b=1", "--beta=1"])
def test_an_assignment_that_cannot_be_read_is_refused(assignment):
    with pytest.raises(ConfigError, match="--set"):
        parse_assignments([assignment])


@pytest.mark.parametrize("pair", [["a=1", "a.b=2"], ["a.b=2", "a=1"]])
def test_a_setting_is_a_value_or_a_table(pair):
    with pytest.raises(ConfigError, match="contradicts"):
        parse_assignments(pair)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "dpo.toml"
    path.write_text("beta = 0.2\n[optimizer]\nlearning_rate = 1e-6\n")
    assert read_toml(path) == {"beta": 0.2, "optimizer": {"learning_rate": 1e-6}}


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "No such configuration file"), (b"beta = ", "Not valid TOML"), (b"\xff\xfe", "Not valid TOML")],
)
def test_a_file_that_cannot_be_read_says_which_and_why(tmp_path, content, what):
    path = tmp_path / "dpo.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=what) as caught:
        read_toml(path)
    assert caught.value.where == str(path)


def test_a_directory_is_no_configuration_file(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        read_toml(tmp_path)


def test_a_template_is_read_from_its_path(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}", encoding="utf-8")
    assert read_template(str(path)) == "{{ messages }}"
    assert read_template(None) is None
    with pytest.raises(ConfigError, match=r"chat_template = .*nowhere"):
        read_template(str(tmp_path / "nowhere"))
