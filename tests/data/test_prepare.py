"""convert, split, mix, dedup: nothing lost without a line that says so, nothing overwritten, and what each promises."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.cli import run
from accord.data.convert import convert
from accord.data.dedup import dedup
from accord.data.formats import read_row
from accord.data.load import load, read_records
from accord.data.mix import mix
from accord.data.problems import fail
from accord.data.split import root, split
from accord.data.write import Changes, canonical
from accord.errors import AccordError, ConfigError, DataError, EmptyDataError, RowError, RunError
from accord.types import (
    Demonstration,
    LabelledCompletion,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    RatedCompletion,
    Record,
    Requirement,
    Source,
)

PLACE = Source("rows.jsonl", 1)
TIE = {"prompt": "p", "completions": ["x", "y"], "ranks": [0, 0]}
EMPTY = {"prompt": "p", "completion": ""}


def pair(prompt: str, chosen: str = "Yes.", rejected: str = "No.") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def adds_up(changes: Changes, rows: int) -> bool:
    return changes.rows == rows == changes.kept + changes.dropped


# --- records to rows and back

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
users = st.builds(Message, st.just("user"), text)
assistants = st.builds(Message, st.just("assistant"), text)
conversation = st.builds(
    lambda system, turns, last: (*system, *(turn for both in turns for turn in both), last),
    st.lists(st.builds(Message, st.just("system"), text), max_size=1),
    st.lists(st.tuples(users, assistants), max_size=2),
    users,
)
answers = st.builds(
    lambda first, more: (first, *(turn for both in more for turn in both)),
    assistants,
    st.lists(st.tuples(users, assistants), max_size=1),
)
forms = st.one_of(st.tuples(text, st.just(text)), st.tuples(conversation, st.just(answers)))
numbers = st.floats(-9, 9)


@st.composite
def records(draw: st.DrawFn) -> Record:
    prompt, answer = draw(forms)
    kind = draw(st.sampled_from([Demonstration, PreferencePair, Ranking, LabelledCompletion, RatedCompletion, Prompt]))
    if kind is Prompt:
        needs = (Requirement("max_words", {"count": draw(st.integers(1, 9))}),) if draw(st.booleans()) else ()
        return Prompt(draw(text), prompt, needs, PLACE)
    if kind is PreferencePair:
        told = draw(st.none() | numbers), PLACE, draw(st.none() | st.floats(0, 1))
        return PreferencePair(prompt, draw(answer), draw(answer), *told)
    if kind is Ranking:
        ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
        order = sorted(set(ranks))
        return Ranking(prompt, tuple(draw(answer) for _ in ranks), tuple(order.index(rank) for rank in ranks), PLACE)
    if kind is LabelledCompletion:
        return LabelledCompletion(prompt, draw(answer), draw(st.booleans()), PLACE)
    if kind is RatedCompletion:
        return RatedCompletion(prompt, draw(answer), draw(st.dictionaries(text, numbers, min_size=1)), PLACE)
    return Demonstration(prompt, draw(answer), PLACE)


@given(records())
def test_a_canonical_row_is_read_back_as_an_equal_record(record: Record) -> None:
    assert read_row(json.loads(json.dumps(canonical(record))), PLACE) == [record]


# --- convert

RANKED = {"prompt": "p", "completions": ["x", "y", "z"], "ranks": [1, 0, 0]}
UP, DOWN = ({"prompt": "p", "completion": word, "label": label} for word, label in (("u", True), ("d", False)))
RATED = {"prompt": "p", "completion": "r", "ratings": {"truth": 3.0}}
SHOWN = {"prompt": "p", "completion": "s"}
EVERY = [pair("q"), RANKED, UP, DOWN, RATED, SHOWN, TIE, EMPTY, {"id": "n", "prompt": "n"}]


def said(prompt: str, completion: str, **more: object) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


@pytest.mark.parametrize(
    ("to", "made", "dropped"),
    [
        (None, [pair("q"), RANKED, UP, DOWN, RATED, SHOWN, {"id": "n", "prompt": "n"}], [7, 8]),
        ("demonstrations", [said("q", "Yes."), said("p", "y"), said("p", "z"), said("p", "u"), SHOWN], [4, 5, 7, 8, 9]),
        ("preferences", [pair("q"), RANKED], [3, 4, 5, 6, 7, 8, 9]),
        ("labels", [said("q", "Yes.", label=True), said("q", "No.", label=False), UP, DOWN], [2, 5, 6, 7, 8, 9]),
        ("ratings", [RATED], [1, 2, 3, 4, 6, 7, 8, 9]),
    ],
)
def test_convert_makes_only_what_is_asked_for(
    tmp_path: Path, to: Any, made: list[dict[str, Any]], dropped: list[int]
) -> None:
    """The best of a ranking is a demonstration only on request; a thumb down, a rating and a tie never are."""
    data = write(tmp_path / "in.jsonl", EVERY)
    out = tmp_path / "out.jsonl"
    changes = convert(data, out, to)
    assert lines(out) == made
    assert adds_up(changes, 9)
    listed = lines(tmp_path / "out.jsonl.changes")
    assert [line["row"] for line in listed] == [f"{data}:{k}" for k in dropped]
    assert all(line["action"] == "dropped" and line["reasons"] for line in listed)


def test_a_fault_counts_only_where_it_matters(tmp_path: Path) -> None:
    """A row with a demonstration and a pair whose sides are equal is a good demonstration, but no preference."""
    data = write(tmp_path / "in.jsonl", [{"instruction": "i", "output": "o", "chosen": "same", "rejected": "same"}])
    convert(data, tmp_path / "sft.jsonl", "demonstrations")
    (made,) = load(str(tmp_path / "sft.jsonl"), "demonstrations").records
    assert made.completion == (Message("assistant", "o"),)
    with pytest.raises(EmptyDataError):
        convert(data, tmp_path / "pairs.jsonl", "preferences")
    convert(data, tmp_path / "prompts.jsonl", "prompts")


def test_convert_to_prompts_names_them_by_id_or_place(tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [pair("q"), {"id": "n", "prompt": "n"}, {"id": "n", "prompt": "again"}])
    changes = convert(data, tmp_path / "out.jsonl", "prompts")
    assert lines(tmp_path / "out.jsonl") == [{"id": f"{data}:1", "prompt": "q"}, {"id": "n", "prompt": "n"}]
    assert changes.summary() == "3 rows: 2 kept, 1 dropped (duplicate-id 1)"
    assert len(load(str(tmp_path / "out.jsonl"), "prompts").records) == 2


def test_what_cannot_be_read_or_is_left_out_is_listed_with_its_place(tmp_path: Path) -> None:
    shp = {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    data = write(tmp_path / "in.jsonl", [shp | {"score_ratio": 3}, shp | {"score_ratio": 1.2}, {"text": "?"}])
    with open(data, "a") as file:
        file.write("not JSON\n")
    changes = convert(f"{data}#shp-clear", tmp_path / "out.jsonl")
    assert changes.causes == Counter({"left-out": 1, "schema": 1, "json": 1})
    assert changes.left_out == 1
    assert changes.summary().startswith("4 rows: 1 kept, 3 dropped (")
    assert adds_up(changes, 4)
    listed = lines(tmp_path / "out.jsonl.changes")
    told = {(line["row"].rpartition(":")[2], line["action"], *line["rules"]) for line in listed}
    assert told == {("2", "left out", "left-out"), ("3", "dropped", "schema"), ("4", "dropped", "json")}


def test_nothing_to_say_writes_no_list(tmp_path: Path) -> None:
    convert(write(tmp_path / "in.jsonl", [pair("q")]), tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("taken", ["out.jsonl", "out.jsonl.changes"])
def test_no_file_is_overwritten(tmp_path: Path, taken: str) -> None:
    data = write(tmp_path / "in.jsonl", [pair("q"), EMPTY])
    (tmp_path / taken).write_text("mine")
    for attempt in (convert, dedup, lambda spec, out: mix({spec: 1.0}, out)):
        with pytest.raises(RunError, match="exists"):
            attempt(data, tmp_path / "out.jsonl")
    assert (tmp_path / taken).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.jsonl", taken])


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [TIE, EMPTY])
    with pytest.raises(EmptyDataError, match="No row is left"):
        convert(data, tmp_path / "out.jsonl")
    with pytest.raises(EmptyDataError, match="part would be empty; 2 rows: 0 kept, 2 dropped"):
        split(data, tmp_path / "parts")
    with pytest.raises(RunError, match="JSON lines"):
        convert(data, tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# --- split

spelled = st.sampled_from(["Why?", "why? ", "WHY?", "How?", "how?\n", "When?", "Where?", "Who?", " who?"])


def asked(prompt: str, k: int) -> dict[str, Any]:
    """The same first turn as plain text, as a message, or with a conversation after it."""
    turns = [{"role": "system", "content": f"s{k}"}, {"role": "user", "content": prompt}]
    if k % 3 == 2:
        turns += [{"role": "assistant", "content": f"a{k}"}, {"role": "user", "content": "And?"}]
    return pair(prompt, f"c{k}", f"r{k}") | ({} if k % 3 == 0 else {"prompt": turns})


@settings(max_examples=30)
@given(st.lists(spelled, min_size=1, max_size=25), st.integers(0, 5))
def test_no_conversation_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    rows = [asked(prompt, k) for k, prompt in enumerate(prompts)]
    data = write(folder / "in.jsonl", rows)
    try:
        parts = split(data, folder / "parts", 0.5, seed)
    except EmptyDataError:
        assert not (folder / "parts").exists()
        return
    train, test = lines(folder / "parts" / "train.jsonl"), lines(folder / "parts" / "test.jsonl")
    roots = [{root(read_row(row, PLACE)[0]) for row in side} for side in (train, test)]
    assert not roots[0] & roots[1]
    # The rows are those of the file, each once, unchanged and in order.
    assert sorted(train + test, key=rows.index) == rows
    assert (len(train), len(test)) == parts[:2]
    assert roots[0] | roots[1] == {prompt.strip().lower() for prompt in prompts}


def test_a_split_has_the_share_asked_for_and_stays_when_rows_are_added(tmp_path: Path) -> None:
    """Of n = 4,000 roots the test part is binomial: 0.1·n ± 5·sqrt(0.09·n) = 400 ± 95 but with odds of 1 in 10^6."""
    rows = [pair(f"Question {k}?") for k in range(4000)]
    small = split(write(tmp_path / "a.jsonl", rows[:2000]), tmp_path / "small", 0.1, 3)
    whole = split(write(tmp_path / "b.jsonl", rows), tmp_path / "whole", 0.1, 3)
    assert abs(whole.test - 400) < 95
    assert lines(tmp_path / "whole" / "test.jsonl")[: small.test] == lines(tmp_path / "small" / "test.jsonl")
    other = split(str(tmp_path / "b.jsonl"), tmp_path / "other", 0.1, 4)
    assert other.train + other.test == 4000
    assert lines(tmp_path / "other" / "test.jsonl") != lines(tmp_path / "whole" / "test.jsonl")
    with pytest.raises(RunError, match="exists"):
        split(str(tmp_path / "b.jsonl"), tmp_path / "whole")
    assert len(load(f"{tmp_path / 'whole'}:train", "preferences").records) == whole.train


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_an_impossible_share_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="leaves no split"):
        split(write(tmp_path / "in.jsonl", [pair("q")]), tmp_path / "parts", share)


def test_rows_that_must_be_told_how_to_be_read_are_converted_first(tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [pair("q")])
    for attempt in (dedup, split, lambda spec, out: mix({spec: 1.0}, out)):
        with pytest.raises(DataError, match="accord data convert"):
            attempt(f"{data}#preference", tmp_path / "out.jsonl")


def test_messages_of_one_tree_stay_together_and_unchanged(tmp_path: Path) -> None:
    def message(tree: int, name: str, parent: str | None, role: str, rank: int | None) -> dict[str, Any]:
        own = {"message_id": name, "parent_id": parent, "role": role, "rank": rank}
        return {"message_tree_id": tree, "text": f"{tree}{name}", **own}

    rows = [
        row
        for tree in range(40)
        for row in (
            message(tree, "q", None, "prompter", None),
            message(tree, "a", "q", "assistant", 1),
            message(tree, "b", "q", "assistant", 0),
        )
    ]
    data = write(tmp_path / "in.jsonl", rows)
    parts = split(data, tmp_path / "parts", 0.5)
    train, test = lines(tmp_path / "parts" / "train.jsonl"), lines(tmp_path / "parts" / "test.jsonl")
    assert sorted(train + test, key=rows.index) == rows
    assert not {row["message_tree_id"] for row in train} & {row["message_tree_id"] for row in test}
    assert (parts.train, parts.test) == (len(train), len(test))
    assert len(load(str(tmp_path / "parts" / "test.jsonl"), "preferences").records) * 3 == parts.test


# --- mix


def numbered(path: Path, name: str, count: int) -> str:
    return write(path / f"{name}.jsonl", [{"prompt": f"{name}{k}", "completion": "c"} for k in range(count)])


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 5)), min_size=1, max_size=4),
    st.integers(1, 60) | st.none(),
    st.booleans(),
    st.integers(0, 9),
)
def test_a_mixture_has_the_shares_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[int, float]],
    rows: int | None,
    again: bool,
    seed: int,
) -> None:
    """Within one row of the exact share; without `again` no row twice; with it, all rows equally often but for one."""
    folder = tmp_path_factory.mktemp("mix")
    weights = {numbered(folder, name, size): weight for name, (size, weight) in zip("abcd", parts, strict=False)}
    try:
        made = mix(weights, folder / "out.jsonl", rows, seed, again=again)
    except (DataError, ConfigError):
        assert not (folder / "out.jsonl").exists()
        return
    drawn = [row["prompt"] for row in lines(folder / "out.jsonl")]
    total = sum(weights.values())
    assert rows is None or abs(len(drawn) - rows) <= len(parts)
    for name, spec, (size, weight) in zip("abcd", weights, parts, strict=False):
        own = Counter(prompt for prompt in drawn if prompt.startswith(name))
        assert own.total() == made[spec].drawn
        assert abs(own.total() - len(drawn) * weight / total) <= 1 + len(parts)
        times = {own[f"{name}{k}"] for k in range(size)}
        assert max(times) - min(times) <= 1
        assert again or max(times) <= 1


def test_shares_decide_how_many_rows_there_can_be(tmp_path: Path) -> None:
    """70 % of N are at most 70 rows and 30 % at most 60: N = 100, so 70 and 30."""
    specs = {numbered(tmp_path, "a", 70): 0.7, numbered(tmp_path, "b", 60): 0.3}
    made = mix(specs, tmp_path / "out.jsonl", seed=1)
    assert [part.drawn for part in made.values()] == [70, 30]
    order = [row["prompt"][0] for row in lines(tmp_path / "out.jsonl")]
    assert "b" in order[:20]
    assert "a" in order[-20:]
    mix(specs, tmp_path / "same.jsonl", seed=1)
    assert (tmp_path / "same.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    mix(specs, tmp_path / "else.jsonl", seed=2)
    assert (tmp_path / "else.jsonl").read_bytes() != (tmp_path / "out.jsonl").read_bytes()


def test_a_part_that_is_too_small_is_an_error_with_two_ways_out(tmp_path: Path) -> None:
    specs = {numbered(tmp_path, "a", 3): 0.5, numbered(tmp_path, "b", 60): 0.5}
    with pytest.raises(DataError, match=r"3 rows are too few for 50.0% of 40(.|\n)*--rows 6, or .*--again"):
        mix(specs, tmp_path / "out.jsonl", 40)
    made = mix(specs, tmp_path / "out.jsonl", 40, again=True)
    assert [part.drawn for part in made.values()] == [20, 20]
    with pytest.raises(DataError, match="not a single row"):
        mix(dict(zip(specs, (1.0, 99.0), strict=True)), tmp_path / "none.jsonl", 10)
    with pytest.raises(ConfigError, match="no end"):
        mix(specs, tmp_path / "none.jsonl", again=True)
    with pytest.raises(ConfigError, match="positive"):
        mix(dict.fromkeys(specs, 0.0), tmp_path / "none.jsonl")


# --- dedup

YES = "It can, because it pushes away as much water as it weighs, and its hollow body takes a lot of room"
NO = "It cannot, and whoever says that they saw one must have seen something else on that day in the harbour"
LONG = "Tell me in plain words how a large ship made of steel can float on the water of a harbour without sinking"


def test_equal_rows_are_dropped_and_the_first_is_named(tmp_path: Path) -> None:
    rows = [pair("q"), pair("q "), pair("q", "No.", "Yes."), pair("q", "Yes!"), UP, DOWN | {"completion": "u"}, UP]
    data = write(tmp_path / "in.jsonl", rows)
    changes = dedup(data, tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == [rows[0], *rows[2:6]]
    assert changes.summary() == "7 rows: 5 kept, 2 dropped (duplicate 2)"
    assert [line["reasons"] for line in lines(tmp_path / "out.jsonl.changes")] == [
        [f"The same as {data}:1."],
        [f"The same as {data}:5."],
    ]


def test_near_repetitions_are_alike_in_every_text(tmp_path: Path) -> None:
    """A common long prompt does not make two different answers repetitions, nor do exchanged sides."""
    rows = [
        pair(LONG, YES, NO),
        pair(f"{LONG}?", f"{YES}!", NO),  # the only repetition
        pair(LONG, "It displaces its weight.", NO),
        pair(LONG, NO, YES),
        pair("Something else altogether, about birds.", YES, NO),
        {"prompt": LONG, "completion": YES},
        {"prompt": f"{LONG}?"},
    ]
    data = write(tmp_path / "in.jsonl", rows)
    assert dedup(data, tmp_path / "exact.jsonl").dropped == 0
    changes = dedup(data, tmp_path / "out.jsonl", 0.8)
    assert lines(tmp_path / "out.jsonl") == [rows[0], *rows[2:]]
    assert changes.causes == Counter({"near-duplicate": 1})
    assert lines(tmp_path / "out.jsonl.changes")[0]["reasons"] == [f"Almost the same as {data}:1."]
    with pytest.raises(ConfigError, match="threshold"):
        dedup(data, tmp_path / "none.jsonl", 1.5)


def test_the_same_prompt_with_another_answer_or_requirement_is_another_row(tmp_path: Path) -> None:
    need = {"kind": "max_words", "count": 3}
    rows = [
        {"prompt": "2 + 2?", "answer": "4"},
        {"prompt": "2 + 2?", "answer": "5"},
        {"prompt": "2 + 2?", "requirements": [need]},
        {"prompt": "2 + 2?", "requirements": [need | {"count": 4}]},
    ]
    data = write(tmp_path / "in.jsonl", [*rows, rows[0]])
    changes = dedup(data, tmp_path / "out.jsonl")
    assert (lines(tmp_path / "out.jsonl"), changes.causes) == (rows, Counter({"duplicate": 1}))


@settings(max_examples=30)
@given(st.lists(st.sampled_from([pair("q"), pair("q", "a"), pair("r"), UP, DOWN, SHOWN, TIE, EMPTY]), max_size=20))
def test_deduplicated_data_holds_every_good_row_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("dedup")
    good = [row for row in rows if row not in (TIE, EMPTY)]
    unique = [row for k, row in enumerate(good) if row not in good[:k]]
    data = write(folder / "in.jsonl", rows)
    if not unique:
        with pytest.raises(AccordError):
            dedup(data, folder / "out.jsonl")
        return
    changes = dedup(data, folder / "out.jsonl")
    assert lines(folder / "out.jsonl") == unique
    assert adds_up(changes, len(rows))
    assert dedup(str(folder / "out.jsonl"), folder / "twice.jsonl").dropped == 0


# --- as a person types them


def test_the_verbs_say_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "in.jsonl", [*(pair(f"Question {k}?") for k in range(30)), pair("Question 1?"), TIE])

    def typed(*words: str) -> str:
        assert run(["data", *words]) == 0
        return capsys.readouterr().out

    out = tmp_path / "unique.jsonl"
    said = typed("dedup", "--data", data, "--out", str(out), "--near", "0.8")
    assert said.splitlines()[0] == "32 rows: 30 kept, 2 dropped (duplicate 1, ties 1)"
    assert f"{out}.changes" in said
    said = typed("split", "--data", str(out), "--out", str(tmp_path / "parts"), "--test", "0.3")
    assert said.startswith("30 rows: 30 kept\n")
    said = typed("convert", "--data", str(out), "--out", str(tmp_path / "sft.jsonl"), "--to", "demonstrations")
    assert said == f"30 rows: 30 kept\n{tmp_path / 'sft.jsonl'}\n"
    assert len(load(str(tmp_path / "sft.jsonl"), "demonstrations").records) == 30
    mixed = str(tmp_path / "mixed.jsonl")
    said = typed("mix", "--data", f"{out}=1", "--data", f"{tmp_path / 'sft.jsonl'}=3", "--out", mixed, "--rows", "20")
    assert "5 drawn (25.0% of the mixture)" in said
    assert said.endswith(f"{mixed}: 20 rows\n")
    assert len(list(read_records(mixed, fail))) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.jsonl"], "has no weight"),
        (["a.jsonl=much"], "has no weight"),
        (["=0.5"], "has no weight"),
        (["a.jsonl=1", "--data", "a.jsonl=2"], "given twice"),
    ],
)
def test_weights_are_checked(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "mix", "--data", *words, "--out", str(tmp_path / "o.jsonl")]) == 1
    assert message in capsys.readouterr().err


def test_a_value_that_json_cannot_hold_has_its_place(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    table = Table.from_pylist([{"prompt": "p", "completion": "c", "image": b"\x00"}])
    parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(RowError, match=r"in.parquet:1: .*bytes(.|\n)*accord data convert"):
        dedup(str(tmp_path / "in.parquet"), tmp_path / "out.jsonl")
    convert(str(tmp_path / "in.parquet"), tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == [{"prompt": "p", "completion": "c"}]


# --- the real thing


def test_real_preferences_survive_the_way_through_all_verbs(shared_data: Path, tmp_path: Path) -> None:
    data = str(shared_data / "hh_harmless" / "train.jsonl.gz")
    before = load(data, "preferences").records
    convert(data, tmp_path / "all.jsonl")
    after = load(str(tmp_path / "all.jsonl"), "preferences").records
    assert [canonical(record) for record in after] == [canonical(record) for record in before]
    parts = split(str(tmp_path / "all.jsonl"), tmp_path / "parts")
    assert parts.train + parts.test == len(before)
    changes = dedup(str(tmp_path / "all.jsonl"), tmp_path / "unique.jsonl", 0.8)
    assert changes.kept > 0.95 * len(before)
