"""docs/rewards.md names every reward's settings, and its example is one; the package is light; answers are read."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from accord.data.formats import read_row
from accord.data.load import load
from accord.data.write import canonical
from accord.errors import RowError
from accord.rewards import REWARDS, RewardConfig
from accord.rewards.custom import CustomConfig
from accord.types import Message, Prompt, Source

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
SOURCE = Source("prompts.jsonl", 3)


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", list(REWARDS))
def test_every_setting_is_documented(name):
    own = set(REWARDS[name].config.model_fields) - set(RewardConfig.model_fields)
    assert [field for field in own if f"`{field}`" not in section(name)] == []


def test_common_and_custom_settings_are_documented():
    common = section("Settings of every reward")
    assert [field for field in RewardConfig.model_fields if f"| `{field}` |" not in common] == []
    own = set(CustomConfig.model_fields) - set(RewardConfig.model_fields)
    assert [field for field in own if f"| `{field}` |" not in section("Your own")] == []


def test_the_examples_are_settings():
    examples = [tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)]
    for settings in (each for example in examples for each in example["rewards"]):
        config = CustomConfig if ":" in settings["name"] else REWARDS[settings["name"]].config
        assert config.build(settings).name == settings["name"]


def test_rewards_import_without_torch():
    script = "import sys, accord.rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({}, None),
        ({"answer": None}, None),
        ({"answer": "72"}, "72"),
        ({"answer": 72}, "72"),
        ({"answer": 51.0}, "51"),
        ({"answer": 0.5}, "0.5"),
        ({"ground_truth": "blue"}, "blue"),
        ({"solution": "\\boxed{1}"}, "\\boxed{1}"),
        ({"answer": None, "solution": "x"}, "x"),
        ({"solution": "def f(): ...", "tests": ["assert f()", "assert not f()"]}, "assert f()\nassert not f()"),
    ],
)
def test_the_answer_of_a_prompt(columns, answer):
    (record,) = read_row({"id": "p", "prompt": "question", **columns}, SOURCE)
    assert record == Prompt("p", "question", source=SOURCE, answer=answer)
    (again,) = read_row(canonical(record), SOURCE)
    assert again == record


@pytest.mark.parametrize("answer", [{"a": 1}, [1], float("inf"), True])
def test_an_answer_of_another_kind_is_an_error(answer):
    with pytest.raises(RowError, match=r"prompts.jsonl:3: Column 'answer'"):
        read_row({"prompt": "question", "answer": answer}, SOURCE)


def test_a_question_with_its_answer_is_a_prompt():
    (record,) = read_row({"question": "6 · 12?", "answer": "6 · 12 = 72\n#### 72"}, SOURCE)
    assert record == Prompt(str(SOURCE), (Message("user", "6 · 12?"),), source=SOURCE, answer="6 · 12 = 72\n#### 72")


def test_messages_and_requirements_carry_an_answer_too():
    turns = [{"role": "user", "content": "6 · 12?"}]
    (record,) = read_row({"messages": turns, "answer": 72}, SOURCE)
    assert record.answer == "72"
    needs = [{"kind": "max_words", "count": 2}]
    (record,) = read_row({"prompt": turns, "requirements": needs, "answer": 72}, SOURCE)
    assert (record.answer, len(record.requirements)) == ("72", 1)


@pytest.mark.parametrize("name", ["svamp/problems", "gsm8k/train"])
def test_public_problems_load_as_prompts_with_answers(shared_data, name):
    loaded = load(str(shared_data / f"{name}.jsonl.gz"), "prompts", limit=50)
    assert len(loaded.records) == 50
    assert all(record.answer for record in loaded.records)
