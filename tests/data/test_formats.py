"""Columns to records: every format, the prompt's boundary, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.data.formats import FORMATS, Format, matching_formats, read_row, read_units
from accord.data.formats.conversation import split_equal_start
from accord.data.problems import Problem
from accord.data.write import canonical
from accord.errors import RowError
from accord.types import (
    Demonstration,
    LabelledCompletion,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    Requirement,
    Source,
)

PLACE = Source("rows.jsonl", 7)


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str) -> Message:
    return Message("assistant", text)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


Q, A, B = turn("user", "Why is the sky blue?"), turn("assistant", "Scattering."), turn("assistant", "Paint.")
q, a, b = user("Why is the sky blue?"), bot("Scattering."), bot("Paint.")

CASES: list[tuple[str, dict[str, Any], Record]] = [
    ("prompt-completion", {"prompt": "2+2=", "completion": " 4"}, Demonstration("2+2=", " 4", PLACE)),
    ("prompt-completion", {"prompt": [Q], "completion": [A]}, Demonstration((q,), (a,), PLACE)),
    ("prompt-completion", {"prompt": [Q], "completion": "Scattering."}, Demonstration((q,), (a,), PLACE)),
    ("prompt-completion", {"prompt": q.content, "completion": [A]}, Demonstration((q,), (a,), PLACE)),
    ("labelled", {"prompt": "p", "completion": "c", "label": False}, LabelledCompletion("p", "c", False, PLACE)),
    ("labelled", {"prompt": [Q], "completion": [A], "label": 1}, LabelledCompletion((q,), (a,), True, PLACE)),
    (
        "preference",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black.", "margin": 2},
        PreferencePair("The sky is", " blue.", " black.", 2.0, PLACE),
    ),
    ("preference", {"prompt": [Q], "chosen": [A], "rejected": [B]}, PreferencePair((q,), (a,), (b,), None, PLACE)),
    # One assistant text for a prompt in messages, as ../shared/data/hh_harmless has it.
    (
        "preference",
        {"id": 1, "prompt": [Q], "chosen": "Scattering.", "rejected": "Paint."},
        PreferencePair((q,), (a,), (b,), None, PLACE),
    ),
    # UltraFeedback's binarised files repeat the prompt inside chosen and rejected.
    (
        "preference",
        {"prompt": q.content, "chosen": [Q, A], "rejected": [Q, B]},
        PreferencePair((q,), (a,), (b,), None, PLACE),
    ),
    (
        "preference",
        {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B], "margin": None},
        PreferencePair((q,), (a,), (b,), None, PLACE),
    ),
    ("implicit-prompt", {"chosen": [Q, A], "rejected": [Q, B]}, PreferencePair((q,), (a,), (b,), None, PLACE)),
    (
        "hh-rlhf",
        {
            "chosen": "\n\nHuman: Why is the sky blue?\n\nAssistant: Scattering.",
            "rejected": "\n\nHuman: Why is the sky blue?\n\nAssistant:Paint. ",
        },
        PreferencePair((q,), (a,), (b,), None, PLACE),
    ),
    ("messages", {"messages": [Q, A]}, Demonstration((q,), (a,), PLACE)),
    ("messages", {"messages": [Q, A, Q, B]}, Demonstration((q,), (a, q, b), PLACE)),
    ("messages", {"messages": [Q, A, Q], "id": "x"}, Prompt("x", (q, a, q), source=PLACE)),
    (
        "conversations",
        {"conversations": [{"from": "human", "value": q.content}, {"from": "gpt", "value": a.content}]},
        Demonstration((q,), (a,), PLACE),
    ),
    (
        "alpaca",
        {"instruction": "Translate.", "input": "Haus", "output": "house", "text": "### Instruction ..."},
        Demonstration((user("Translate.\n\nHaus"),), (bot("house"),), PLACE),
    ),
    (
        "alpaca",
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        Demonstration((user("Greet."),), (bot("Hello"),), PLACE),
    ),
    (
        "alpaca-preference",
        {"instruction": "Greet.", "chosen": "Hello", "rejected": "What?"},
        PreferencePair((user("Greet."),), (bot("Hello"),), (bot("What?"),), None, PLACE),
    ),
    (
        "dolly",
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"},
        Demonstration((user("Who?\n\nAda wrote it."),), (bot("Ada"),), PLACE),
    ),
    (
        "ranking",
        {"prompt": "p", "completions": ["x", "y", "z"], "ranks": [2, 1, 2]},
        Ranking("p", ("x", "y", "z"), (1, 0, 1), PLACE),
    ),
    (
        "ranking",
        {"prompt": [Q], "completions": ["Scattering.", [B]], "ranks": [0, 1]},
        Ranking((q,), ((a,), (b,)), (0, 1), PLACE),
    ),
    (
        "ranked-answers",
        {
            "prompt": "\n\nHuman: Why is the sky blue?\n\nAssistant: ",
            "answers": [{"answer": "Paint.", "rank": 7.0, "model": "m"}, {"answer": "Scattering.", "rank": 1.0}],
            "turns": 1,
        },
        Ranking((q,), ((b,), (a,)), (1, 0), PLACE),
    ),
    ("prompt", {"prompt": "p"}, Prompt("rows.jsonl:7", "p", source=PLACE)),
    (
        "humaneval",
        {"task_id": "x/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1)\n"},
        Prompt("rows.jsonl:7", "def f(x):\n", (), PLACE, "def check(f):\n    assert f(1)\n\ncheck(f)"),
    ),
    (
        "mbpp",
        {"text": "Write f.", "test_list": ["assert f(1)", "assert f(2)"], "test_setup_code": "n = 1", "code": "…"},
        Prompt(
            "rows.jsonl:7",
            (user("Write f.\n\nYour code should pass these tests:\n\nassert f(1)\nassert f(2)"),),
            (),
            PLACE,
            "n = 1\nassert f(1)\nassert f(2)",
        ),
    ),
    (
        "mbpp-sanitized",
        {"prompt": "Write f.", "test_list": ["assert f(1)"], "test_imports": ["import math"], "task_id": 2},
        Prompt(
            "rows.jsonl:7",
            (user("Write f.\n\nYour code should pass these tests:\n\nassert f(1)"),),
            (),
            PLACE,
            "import math\nassert f(1)",
        ),
    ),
    ("question-answer", {"question": "Q?", "answer": 4}, Prompt("rows.jsonl:7", (user("Q?"),), (), PLACE, "4")),
    (
        "requirements",
        {"id": "r1", "prompt": [Q], "requirements": [{"kind": "max_words", "count": 9, "keyword": None}]},
        Prompt("r1", (q,), (Requirement("max_words", {"count": 9}),), PLACE),
    ),
]


@pytest.mark.parametrize(("name", "row", "record"), CASES)
def test_columns_become_the_record(name: str, row: dict[str, Any], record: Record) -> None:
    assert matching_formats(row) == [name]
    assert read_row(row, PLACE) == [record]


@pytest.mark.parametrize("row", [row for _, row, _ in CASES])
def test_a_spoilt_row_is_refused_or_read_never_a_crash(row: dict[str, Any], spoilt_rows: Any) -> None:
    for odd in spoilt_rows(row):
        problems: list[Problem] = []
        for _, _, records in read_units([(PLACE, odd)], None, problems.append):
            for record in records:
                json.dumps(canonical(record), allow_nan=False, ensure_ascii=False).encode()
        assert all(problem.what and problem.fix for problem in problems)


def test_every_built_in_format_is_exercised() -> None:
    modules = (
        "trl",
        "hh",
        "instructions",
        "programs",
        "rankings",
        "requirements",
    )  # test_formats_public.py has the others
    assert {name for name, _, _ in CASES} == {
        name for name in FORMATS if FORMATS[name].read.__module__.endswith(modules)
    }


def test_a_row_that_holds_two_records_yields_both() -> None:
    row = {"instruction": "Greet.", "output": "Hello", "chosen": "Hello", "rejected": "What?"}
    assert [type(record) for record in read_row(row, PLACE)] == [Demonstration, PreferencePair]


HH = "\n\nHuman: Hi\n\nAssistant: Hello"

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"question": "x", "reply": "y"}, "No known format has the columns question, reply"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "without a prompt"),
    ({"chosen": HH, "rejected": "Hello"}, "without a prompt"),
    ({"chosen": HH + "\n\nAssistant: again", "rejected": HH}, "turn 3: the assistant speaks where it is the user's"),
    ({"chosen": "\n\nAssistant: Hello", "rejected": HH}, "turn 1: the assistant speaks"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": HH}, r"turn 2 \(assistant\) is empty"),
    ({"chosen": HH, "rejected": "\n\nHuman: Bye\n\nAssistant: Hello"}, "first differ in message 1"),
    ({"chosen": [A], "rejected": [B]}, "no equal leading messages"),
    ({"chosen": [Q, A, Q, A], "rejected": [Q, A, A, A]}, "first differ in message 3"),
    ({"chosen": [], "rejected": []}, "no equal leading messages"),
    ({"prompt": "p", "completion": None}, "'completion' must be text, not null"),
    ({"prompt": 3, "completion": "c"}, "'prompt' must be text, not int"),
    ({"prompt": "p", "completion": "c\ud800"}, r"surrogate pair \(character 2\)"),
    ({"prompt": "p", "completion": "c", "label": "good"}, "'label' must be true or false"),
    ({"prompt": "p", "completion": "c", "label": None}, "'label' must be true or false"),
    ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": "big"}, "'margin' must be a finite number"),
    ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": float("nan")}, "'margin' must be a finite number"),
    ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": 10**400}, "'margin' must be a finite number"),
    ({"prompt": "p", "chosen": "x", "rejected": [B]}, "same prompt"),
    ({"messages": "hello"}, "'messages' must be a list, not str"),
    ({"messages": [turn("narrator", "x")]}, "message 1: the role must be one of"),
    ({"messages": ["hello"]}, "message 1: the role must be one of"),
    ({"messages": [Q, {"role": "assistant", "content": None}]}, "message 2 must be text, not null"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 must be text, not list"),
    ({"prompt": "p", "completions": ["x"], "ranks": [0, 1]}, "1 completions but 2 ranks"),
    ({"prompt": "p", "completions": ["x", "y"], "ranks": ["a", "b"]}, "Ranks must be numbers"),
    ({"prompt": "p", "answers": [{"answer": "x"}]}, "an answer and a rank"),
    ({"prompt": "p", "requirements": [{"kind": "max_wordz"}]}, "max_words"),
    ({"prompt": "p", "requirements": ["short"]}, "must be an object"),
    ({"prompt": "def f():", "test": "assert f()", "entry_point": "f"}, "defines no function check"),
    ({"prompt": "def f():", "test": "def check(f): pass", "entry_point": "a b"}, "The tests are not Python"),
    ({"prompt": "p", "test_list": ["assert ("]}, "The tests are not Python"),
    ({"prompt": "p", "test_list": "assert f()"}, "'test_list' must be a list"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_what_a_format_refuses_has_a_place_and_a_way_out(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        read_row(row, PLACE)
    assert caught.value.where == "rows.jsonl:7"
    assert caught.value.fix


def test_typed_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    (record,) = read_row({"messages": [{"role": "user", "content": parts}]}, PLACE)
    assert record == Prompt("rows.jsonl:7", (user("Hello"),), source=PLACE)


def test_the_plain_prompt_is_kept_when_the_messages_do_not_repeat_it() -> None:
    (record,) = read_row({"prompt": "Be brief.", "completion": [Q, A]}, PLACE)
    assert record == Demonstration((user("Be brief."),), (q, a), PLACE)


WORDS = st.sampled_from(["yes", "no", "yes indeed", "perhaps"])


@given(st.lists(WORDS, min_size=1, max_size=5), st.data())
def test_the_implicit_prompt_ends_at_the_first_different_message(spoken: list[str], data: st.DataObject) -> None:
    """Conversations with a common start of n messages that then differ in an assistant turn: the prompt is those n.

    The two answers share leading characters ("yes", "yes indeed"), which must not move the boundary.
    """
    start = tuple(user(text) if k % 2 == 0 else bot(text) for k, text in enumerate(spoken))
    start = start if len(start) % 2 else (*start, user("and now?"))
    tail = tuple(data.draw(st.sampled_from([(), (user("ok"), bot("good"))])))
    chosen, rejected = (*start, bot("yes indeed"), *tail), (*start, bot("yes"))
    assert split_equal_start(chosen, rejected, PLACE) == (start, chosen[len(start) :], rejected[len(start) :])


def test_identical_conversations_split_before_their_last_assistant_turn() -> None:
    assert split_equal_start((q, a, q, b), (q, a, q, b), PLACE) == ((q, a, q), (b,), (b,))


def test_a_conversation_that_continues_the_other_begins_where_both_answer() -> None:
    assert split_equal_start((q, a), (q, a, q, b), PLACE) == ((q,), (a,), (a, q, b))


@given(st.lists(st.integers(-3, 9), min_size=1, max_size=6))
def test_ranks_keep_their_order_and_lose_their_gaps(ranks: list[int]) -> None:
    (record,) = read_row({"prompt": "p", "completions": ["c"] * len(ranks), "ranks": ranks}, PLACE)
    assert isinstance(record, Ranking)
    # rank = how many distinct better ranks there are
    assert record.ranks == tuple(len({other for other in ranks if other < rank}) for rank in ranks)


def test_a_format_of_ones_own_takes_the_row_it_describes_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(row: Any, source: Source) -> list[Record]:
        return [Demonstration(row["prompt"], row["answer"], source)]

    monkeypatch.setattr(
        FORMATS, "_rows", {**FORMATS._rows, "quiz": Format(("prompt", "answer"), "Demonstration", read)}
    )
    assert read_row({"prompt": "2+2", "answer": "4"}, PLACE) == [Demonstration("2+2", "4", PLACE)]
