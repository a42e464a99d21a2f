"""Records for one kind of training: lossless conversions, loud failures, nothing dropped silently."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.data.load import load
from accord.data.usable import pairs
from accord.errors import ConfigError, EmptyDataError, RowError, UnknownNameError
from accord.types import Demonstration, Message, PreferencePair, Ranking, Source

SFT = {"prompt": "2+2=", "completion": " 4"}
PAIR = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}
RANKING = {"prompt": "2+2=", "completions": [" 4", " 5", " four"], "ranks": [1, 2, 1]}
LABELLED = {"prompt": "2+2=", "completion": " 5", "label": False}
ONLY_PROMPT = {"id": "sum", "prompt": "2+2="}


def write(folder: Path, *rows: dict[str, Any] | str) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_each_kind_gets_the_records_it_trains_on(tmp_path: Path) -> None:
    place = Source(write(tmp_path, SFT), 1)
    assert load(place.path, "demonstrations").records == [Demonstration("2+2=", " 4", place)]
    write(tmp_path, PAIR, RANKING)
    pair, second = PreferencePair("2+2=", " 4", " 5", None, place), Source(place.path, 2)
    assert load(place.path, "preferences").records == [pair, Ranking("2+2=", (" 4", " 5", " four"), (0, 1, 0), second)]


def test_every_row_has_a_prompt_to_sample_from(tmp_path: Path) -> None:
    spec = write(tmp_path, ONLY_PROMPT, SFT, PAIR, RANKING, LABELLED)
    records = load(spec, "prompts").records
    assert [record.id for record in records] == ["sum", f"{spec}:2", f"{spec}:3", f"{spec}:4", f"{spec}:5"]
    assert {record.content for record in records} == {"2+2="}


def test_a_row_of_two_records_serves_both_kinds(tmp_path: Path) -> None:
    spec = write(tmp_path, {"instruction": "Greet.", "output": "Hello", "chosen": "Hello", "rejected": "What?"})
    prompt = (Message("user", "Greet."),)
    assert load(spec, "demonstrations").records == [
        Demonstration(prompt, (Message("assistant", "Hello"),), Source(spec, 1))
    ]
    assert len(load(spec, "preferences").records) == 1
    assert [record.content for record in load(spec, "prompts").records] == [prompt]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (PAIR, "demonstrations", "a preference pair, and demonstrations are wanted"),
        (RANKING, "demonstrations", "a ranking, and demonstrations are wanted"),
        (LABELLED, "demonstrations", "a labelled completion, and demonstrations are wanted"),
        (ONLY_PROMPT, "demonstrations", "a prompt without a completion"),
        (SFT, "preferences", "a demonstration, and preferences are wanted"),
        (LABELLED, "preferences", "a labelled completion"),
        (PAIR | {"rejected": "  4\n"}, "preferences", "the same text"),
        (PAIR | {"chosen": " \n"}, "preferences", "The chosen is empty"),
        (SFT | {"completion": ""}, "demonstrations", "The completion is empty"),
        (SFT | {"prompt": ""}, "demonstrations", "The prompt is empty"),
        (SFT | {"prompt": []}, "demonstrations", "The prompt is empty"),
        (
            {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]},
            "demonstrations",
            r"Message 1 \(user\) of the prompt is empty",
        ),
        ({"prompt": [], "completion": [{"role": "user", "content": "x"}]}, "demonstrations", "prompt is empty"),
        (
            {"prompt": "p", "completion": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
            "demonstrations",
            "does not begin and end with the assistant",
        ),
        (RANKING | {"ranks": [0, 0, 0]}, "preferences", "None of the 3 completions is better"),
        ({"prompt": "p", "completions": ["x"], "ranks": [0]}, "preferences", "None of the 1 completions"),
        (RANKING | {"completions": [" 4", " 4", " four"]}, "preferences", "same completion has two different ranks"),
        (ONLY_PROMPT | {"prompt": ""}, "prompts", "The prompt is empty"),
        ({"prompt": 1}, "prompts", "must be text"),
    ],
)
def test_a_row_that_cannot_be_used_names_its_line(tmp_path: Path, row: Any, kind: Any, message: str) -> None:
    good = ONLY_PROMPT if kind == "prompts" else SFT if kind == "demonstrations" else PAIR
    spec = write(tmp_path, good, row, good | {"id": "other"})
    with pytest.raises(RowError, match=message) as caught:
        load(spec, kind)
    assert caught.value.where == f"{spec}:2"
    assert caught.value.fix
    kept = load(spec, kind, skip_bad=True)
    assert (len(kept.records), kept.rows) == (2, 3)
    assert list(kept.dropped.values()) == [[Source(spec, 2)]]


def test_an_empty_system_message_is_a_choice_not_a_fault(tmp_path: Path) -> None:
    roles = [("system", ""), ("user", "Hi"), ("assistant", "Hello")]
    spec = write(tmp_path, {"messages": [{"role": role, "content": text} for role, text in roles]})
    assert len(load(spec, "demonstrations").records) == 1


def test_many_problems_are_counted_and_five_are_listed(tmp_path: Path) -> None:
    spec = write(tmp_path, SFT, "nonsense", *[SFT | {"completion": ""}] * 6, {"text": "x"})
    with pytest.raises(RowError) as caught:
        load(spec, "demonstrations")
    message = str(caught.value)
    assert "8 of 9 rows cannot be used as demonstrations" in message
    assert [line for line in range(1, 10) if f"{spec}:{line}:" in message] == [2, 3, 4, 5, 6]
    assert "and 3 more" in message
    kept = load(spec, "demonstrations", skip_bad=True)
    assert (len(kept.records), kept.rows) == (1, 9)
    assert {rule: [place.line for place in places] for rule, places in kept.dropped.items()} == {
        "json": [2],
        "empty": [3, 4, 5, 6, 7, 8],
        "schema": [9],
    }
    assert kept.summary() == (
        f"1 records from 9 rows; dropped 8: json 1 ({spec}:2), "
        f"empty 6 ({spec}:3, {spec}:4, {spec}:5, {spec}:6, {spec}:7, ...), schema 1 ({spec}:9)"
    )


def test_nothing_left_is_empty_data(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match="dropped 1: kind 1"):
        load(write(tmp_path, PAIR), "demonstrations", skip_bad=True)


def test_two_prompts_must_not_share_an_id(tmp_path: Path) -> None:
    spec = write(tmp_path, ONLY_PROMPT, ONLY_PROMPT | {"prompt": "3+3="})
    with pytest.raises(RowError, match="Another prompt has the id 'sum'") as caught:
        load(spec, "prompts")
    assert caught.value.where == f"{spec}:2"


def test_the_limit_stops_reading(tmp_path: Path) -> None:
    spec = write(tmp_path, RANKING, PAIR, "nonsense")
    assert len(load(spec, "preferences", 2).records) == 2
    with pytest.raises(ConfigError, match="at least 1"):
        load(spec, "preferences", 0)


def test_an_unknown_kind_has_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'preferences'"):
        load(write(tmp_path, PAIR), "preference")  # type: ignore[call-overload]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=9))
def test_a_ranking_is_all_its_strictly_ordered_pairs(ranks: list[int]) -> None:
    """K completions make K(K-1)/2 pairs, less t(t-1)/2 for every group of t tied ones."""
    ranking = Ranking("p", tuple(map(str, range(len(ranks)))), tuple(ranks))
    made = pairs(ranking)
    size = len(ranks)
    ties = sum(count * (count - 1) // 2 for count in Counter(ranks).values())
    assert len(made) == len(set(made)) == size * (size - 1) // 2 - ties
    assert all(ranks[int(str(pair.chosen))] < ranks[int(str(pair.rejected))] for pair in made)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("hh_harmless:train", "preferences", 1595),
        ("hh_harmless/test.jsonl.gz", "preferences", 304),
        ("oasst_trees/pairs.jsonl.gz", "preferences", 677),
        ("oasst_trees/sft.jsonl.gz", "demonstrations", 223),
        ("oasst_trees/prompts.jsonl.gz", "prompts", 250),
        ("instruct_1100", "demonstrations", 955),
        ("self_instruct", "demonstrations", 362),
    ],
)
def test_real_data_sets_load_whole(shared_data: Path, name: str, kind: Any, count: int) -> None:
    loaded = load(f"{shared_data}/{name}", kind)
    assert (len(loaded.records), loaded.rows, loaded.dropped) == (count, count, {})


def test_real_conversations_become_messages(shared_data: Path) -> None:
    for pair in load(f"{shared_data}/hh_harmless:train", "preferences").records:
        for side in (pair.chosen, pair.rejected):
            assert [turn.role for turn in side if isinstance(turn, Message)] == ["assistant"]
        assert isinstance(pair.prompt[-1], Message)
        assert pair.prompt[-1].role == "user"
