"""Where an answer is found and when two are the same."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.errors import ConfigError
from accord.rewards import REWARDS
from accord.rewards.answers import as_number, boxed, last_number, marked, same_text
from accord.types import Completion, Prompt

CONFIG = REWARDS["exact_answer"].config


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        ("It costs $1,234.50.", Fraction("1234.5")),
        ("-3", -3),
        ("−3", -3),
        ("-$5", -5),
        ("10-5", 5),
        ("10 - 5", 5),
        ("1/2", Fraction(1, 2)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("2e3", 2000),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        ("1, 2, 3", 3),
        ("5kg", 5),
        ("12{,}000", 12000),
        ("3. Then 4.", 4),
        ("<<48/2=24>>24 clips", 24),
        ("1/0 of it", None),
        ("B12 and H2O", None),
        ("no number", None),
        ("7" * 80, None),
        ("1e99999999", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_an_integer_is_found_however_it_is_written(value):
    for written in (f"{value}", f"{value:,}", f"{value}.0", f"${value}$", f"{value}%"):
        assert as_number(written) == value, written
        assert last_number(f"After 17 steps: {written}.") == value, written


@given(st.decimals(-(10**6), 10**6, places=3), st.text(st.characters(categories=["L", "Zs"]), max_size=20))
def test_the_last_number_is_read_exactly_behind_any_words(value, words):
    assert last_number(f"{words} {value:f}") == Fraction(value)


@given(st.fractions(max_denominator=1000))
def test_a_fraction_is_read_exactly(value):
    assert last_number(f"so {value.numerator}/{value.denominator}") == value


@given(st.text())
def test_any_text_has_a_number_or_none(text):
    found = last_number(text)
    assert found is None or isinstance(found, Fraction)
    assert as_number(text) is None or as_number(text) == found


def nested(inner):
    return st.lists(st.one_of(inner, inner.map(lambda text: f"{{{text}}}")), max_size=4).map("".join)


@given(nested(nested(st.text("ab1 \\", max_size=4))), st.text("xyz{}", max_size=8))
def test_a_box_is_read_to_its_own_brace(inside, after):
    assert boxed(f"thus \\boxed{{{inside}}}{after}") == inside


@pytest.mark.parametrize("text", ["", "\\boxed{1", "\\boxed 1", "boxed{1}"])
def test_no_box(text):
    assert boxed(text) is None


def test_marked_is_the_rest_of_the_last_marked_line():
    assert marked("#### 1\nno\n#### 72 \nend") == "72"
    assert marked("# 72") is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Paris", " paris. "),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\dfrac{\\pi}{2})"),
        ("p - q", "p-q"),
        ("\\text{even}", "Even"),
        ("**Blue**", "blue"),
    ],
)
def test_the_same_text(one, other):
    assert same_text(one, other)
    assert not same_text(one, other + "x")


@pytest.mark.parametrize(
    ("text", "answer", "settings", "reward"),
    [
        ("17 + 55 = 72", "72", {}, 1),
        ("17 + 55 = 73", "72", {}, 0),
        ("The answer is \\boxed{72}, I tried 5 times", "72", {}, 1),
        ("#### 72\nThat took 5 steps", "72", {}, 1),
        ("72", "48/2 = 24, 24 + 48 = 72\n#### 72", {}, 1),
        ("24", "48/2 = 24, 24 + 48 = 72\n#### 72", {}, 0),
        ("It is 51.0", "51", {}, 1),
        ("0.3333334", "1/3", {}, 1),
        ("0.333", "1/3", {}, 0),
        ("0.333", "1/3", {"tolerance": 0.001}, 1),
        ("72", "72", {"extract": "boxed"}, 0),
        ("It is 72", "72", {"extract": "whole"}, 0),
        ("$72$.", "72", {"extract": "whole"}, 1),
        ("paris", "Paris", {}, 1),
        ("It is Paris", "Paris", {}, 0),
        ("\\boxed{Paris}", "Paris", {}, 1),
        ("Final: B\nReason: A", "B", {"pattern": r"Final: (\w+)"}, 1),
        ("no final word", "B", {"pattern": r"Final: (\w+)"}, 0),
        ("", "72", {}, 0),
    ],
)
def test_exact_answer(say, text, answer, settings, reward):
    assert say("exact_answer", text, answer=answer, **settings) == reward


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_prompt_without_an_answer_fails(say, answer):
    assert say("exact_answer", "72", answer=answer) == "the prompt has no answer"


def test_a_pattern_that_takes_for_ever_is_a_timeout(say):
    assert say("exact_answer", "a" * 40 + "!", answer="1", pattern=r"^(?:a|a|aa)+$") == "timeout"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "x", "extract": "boxed"}, "not both"),
        ({"tolerence": 1.0}, "Did you mean 'tolerance'"),
        ({"tolerance": -1.0}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        CONFIG.build({"name": "exact_answer", **settings})


@pytest.mark.parametrize("name", ["svamp/problems", "gsm8k/test"])
def test_the_answers_of_public_problems_are_numbers(shared_data, name):
    with gzip.open(shared_data / f"{name}.jsonl.gz", "rt") as file:
        answers = [str(json.loads(line)["answer"]) for line in file]
    assert [answer for answer in answers if as_number(answer) is None] == []


def test_every_verdict_on_real_solutions_is_that_of_the_data_set(shared_data):
    """GSM8K's own labels of 4,548 solutions by four models; references end with ``A: number``."""
    kind = REWARDS["exact_answer"]
    reward = kind.build(kind.config(name="exact_answer"), None)
    prompts, completions, correct = [], [], []
    with gzip.open(shared_data / "gsm8k" / "model_solutions.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            prompt = Prompt("p", row["question"], answer=row["reference"].rpartition("A:")[2])
            for solution in row["solutions"]:
                prompts.append(prompt)
                completions.append(Completion("p", solution["text"], (), (), (), "stop", temperature=1.0, seed=0))
                correct.append(float(solution["correct"]))
    assert len(correct) > 4000
    assert reward(prompts, completions) == correct


def test_a_worked_solution_has_the_answer_that_the_data_set_says(shared_data, say):
    with gzip.open(next((shared_data / "math500").glob("*.jsonl.gz")), "rt") as file:
        rows = [json.loads(line) for line in file]
    wrong = [row["id"] for row in rows if say("exact_answer", row["solution"], answer=row["answer"]) != 1]
    assert wrong == []
    swapped = [say("exact_answer", row["solution"], answer="no such answer") for row in rows]
    assert set(swapped) == {0.0}
