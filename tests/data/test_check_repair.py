"""`--fix`: nothing is lost from sight, nothing old is touched, and what is written is sound."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accord.data.check import RULES, check
from accord.errors import ConfigError, EmptyDataError, RowError

PAIR = {"prompt": "Name a bird.", "chosen": "A wren.", "rejected": "A trout."}


def line(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def write(path: Path, *rows: Any) -> str:
    path.write_bytes(b"".join(line(row) + b"\n" for row in rows))
    return str(path)


def rows_of(path: Path) -> list[Any]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_bad_rows_are_dropped_and_told_with_place_rule_and_reason(tmp_path: Path) -> None:
    spec = write(tmp_path / "old.jsonl", PAIR | {"extra": [1]}, b"{", PAIR | {"chosen": "", "prompt": "p"}, PAIR)
    before = Path(spec).read_bytes()
    report = check(spec, fix=tmp_path / "new.jsonl")
    assert rows_of(tmp_path / "new.jsonl") == [PAIR | {"extra": [1]}]
    changes = rows_of(tmp_path / "new.jsonl.changes")
    assert [(change["row"], change["action"], change["rules"]) for change in changes] == [
        (f"{spec}:2", "dropped", ["json"]),
        (f"{spec}:3", "dropped", ["empty"]),
        (f"{spec}:4", "dropped", ["duplicate"]),
    ]
    assert changes[1]["reasons"] == ["The chosen is empty."]
    assert report.repaired is not None
    assert (report.repaired.kept, report.repaired.changed, report.repaired.dropped) == (1, 0, 3)
    assert Path(spec).read_bytes() == before


def test_what_can_be_repaired_is_changed(tmp_path: Path) -> None:
    spec = write(
        tmp_path / "old.jsonl",
        {"id": "a", "prompt": "Name a bird."},
        {"id": "a", "prompt": "Name a fish."},
        b'{"prompt": "half \\ud800 a pair", "completion": "c", "note": "\\udfff"}',
        {"messages": [turn("user", "Hi"), turn("user", "there"), turn("assistant", "Hello")]},
        {"prompt": [turn("user", "Hi"), turn("assistant", "Hello")], "completion": [turn("assistant", "Still there?")]},
    )
    report = check(spec, fix=tmp_path / "new.jsonl")
    written = rows_of(tmp_path / "new.jsonl")
    assert written[1] == {"prompt": "Name a fish."}
    assert written[2] == {"prompt": "half \ufffd a pair", "completion": "c", "note": "\ufffd"}
    assert written[3] == {"messages": [turn("user", "Hi\n\nthere"), turn("assistant", "Hello")]}
    assert written[4]["completion"] == [turn("assistant", "Still there?")], "two columns cannot be joined"
    assert [change["rules"] for change in rows_of(tmp_path / "new.jsonl.changes")] == [
        ["duplicate-id"],
        ["surrogate"],
        ["alternation"],
    ]
    assert report.repaired is not None
    assert (report.repaired.kept, report.repaired.changed, report.repaired.dropped) == (5, 3, 0)
    assert {finding.rule for finding in check(str(tmp_path / "new.jsonl")).findings} == {"alternation"}


def test_rows_of_the_test_set_are_dropped(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", {"prompt": "Name a bird."})
    spec = write(tmp_path / "old.jsonl", PAIR, PAIR | {"prompt": "Name a river bird."})
    check(spec, against=[test], fix=tmp_path / "new.jsonl")
    assert [row["prompt"] for row in rows_of(tmp_path / "new.jsonl")] == ["Name a river bird."]


def test_the_kind_decides_what_is_kept(tmp_path: Path) -> None:
    spec = write(tmp_path / "old.jsonl", PAIR, {"prompt": "p", "completion": "c"})
    check(spec, "demonstrations", fix=tmp_path / "new.jsonl")
    assert rows_of(tmp_path / "new.jsonl") == [{"prompt": "p", "completion": "c"}]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    spec = write(tmp_path / "old.jsonl", PAIR)
    with pytest.raises(ConfigError, match="exists"):
        check(spec, fix=Path(spec))
    (tmp_path / "new.jsonl.changes").touch()
    with pytest.raises(ConfigError, match="exists"):
        check(spec, fix=tmp_path / "new.jsonl")
    with pytest.raises(ConfigError, match="JSON lines"):
        check(spec, fix=tmp_path / "new.csv")
    with pytest.raises(ConfigError, match="part of the data"):
        check(str(tmp_path), fix=tmp_path / "below" / "new.jsonl")


def test_no_row_left_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match="No row is left"):
        check(write(tmp_path / "old.jsonl", b"{"), fix=tmp_path / "new.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]


def test_a_damaged_file_is_not_repaired(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl.gz").write_bytes(gzip.compress(line(PAIR) + b"\n", mtime=0)[:-4])
    with pytest.raises(RowError, match="cut short"):
        check(str(tmp_path / "old.jsonl.gz"), fix=tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()


TEXT = st.sampled_from(["", " ", "a", "b ", "ab", "\ud800", "é"])
ROWS = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "id": st.integers(0, 2)}),
    st.fixed_dictionaries({"messages": st.lists(st.builds(turn, st.sampled_from(["user", "assistant"]), TEXT))}),
    st.sampled_from([b"{", b'{"text": 1}', b"[]", b'{"prompt": "\xff"}', b'{"prompt": 3}']),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=12))
def test_kept_and_dropped_add_up_and_what_is_kept_is_sound(tmp_path: Path, rows: list[Any]) -> None:
    spec = write(tmp_path / "old.jsonl", PAIR, *rows)
    new = tmp_path / "new.jsonl"
    new.unlink(missing_ok=True)
    Path(f"{new}.changes").unlink(missing_ok=True)
    done = check(spec, fix=new).repaired
    assert done is not None
    changes = rows_of(done.changes)
    actions = [change["action"] for change in changes]
    kept = rows_of(new)
    assert (done.kept, done.dropped, done.changed) == (len(kept), actions.count("dropped"), actions.count("changed"))
    assert len(kept) + actions.count("dropped") == 1 + len(rows)
    assert len({change["row"] for change in changes}) == len(changes)
    assert all(change["rules"] and len(change["reasons"]) > 0 for change in changes)
    again = check(str(new))
    assert not again.has_errors
    assert [finding.rule for finding in again.findings if RULES[finding.rule].action == "drop"] == []


def test_two_ratings_of_one_answer_are_two_records(tmp_path: Path) -> None:
    rated = {"prompt": "p", "completion": "c", "ratings": {"truth": 3}}
    spec = write(tmp_path / "old.jsonl", rated, rated | {"ratings": {"truth": 1}}, rated)
    check(spec, fix=tmp_path / "new.jsonl")
    assert [row["ratings"]["truth"] for row in rows_of(tmp_path / "new.jsonl")] == [3, 1]
