"""Rows and their places from every kind of file; what is broken says where."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from accord.data.problems import Problem
from accord.data.sources import read_rows
from accord.errors import DataError, EmptyDataError, MissingDataError, RowError

ROWS = [
    {"prompt": "Name a river.", "completion": "The Elbe"},
    {"prompt": 'Two\nlines, and a "quote"', "completion": "é, 河"},
    {"prompt": "Name a bird.", "completion": " Wren "},
]


def encode(rows: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    if suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(path: Path | str) -> list[tuple[int, dict[str, Any]]]:
    return [(source.line, row) for source, row in read_rows(str(path))]


# Line 1 of a CSV file is the header and the second row spans two lines; an indented JSON array has `[` on line 1 and
# four lines per object; the "line" of parquet is the row.
@pytest.mark.parametrize(
    ("suffix", "lines"), [(".jsonl", [1, 2, 3]), (".json", [2, 6, 10]), (".csv", [2, 3, 5]), (".parquet", [1, 2, 3])]
)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_each_file_type_gives_rows_and_places(tmp_path: Path, suffix: str, lines: list[int], packed: str) -> None:
    path = write(tmp_path / f"rows{suffix}{packed}", encode(ROWS, suffix))
    assert read(path) == list(zip(lines, ROWS, strict=True))
    assert [source.path for source, _ in read_rows(str(path))] == [str(path)] * 3


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)


@given(st.lists(st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}), min_size=1, max_size=6))
def test_any_text_survives_every_file_type(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        path = write(folder / f"rows{suffix}.gz", encode(rows, suffix))
        assert [row for _, row in read(path)] == rows


def test_blank_lines_and_a_byte_order_mark_are_not_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\n\n  \n{"prompt": "b"}')
    assert read(path) == [(1, {"prompt": "a"}), (4, {"prompt": "b"})]


def test_structured_csv_cells_hold_json(tmp_path: Path) -> None:
    text = 'prompt,label,margin,messages\n[1] is a list,TRUE,0.5,"[{""role"": ""user"", ""content"": ""x""}]"\n,,,\n'
    assert [row for _, row in read(write(tmp_path / "a.csv", text.encode()))] == [
        {"prompt": "[1] is a list", "label": True, "margin": 0.5, "messages": [{"role": "user", "content": "x"}]},
        {"prompt": "", "label": None, "margin": None, "messages": None},
    ]


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("name", "raw", "line", "message"),
    [
        ("a.jsonl", GOOD + b'{"prompt": "caf\xe9"}\n', 2, "Not valid UTF-8: byte 0xe9 at position 16"),
        ("a.jsonl", GOOD + b'{"prompt": \n', 2, "Not valid JSON"),
        ("a.jsonl", GOOD + b"[1, 2]\n", 2, "not a list"),
        ("a.jsonl", b"null\n", 1, "not null"),
        ("a.jsonl", b"[" * 100_000, 1, "Not valid JSON"),
        ("a.json", b'[{"prompt": "a"},\n 3]', 2, "not a number"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt"]', 2, "Not valid JSON"),
        ("a.json", b'[{"prompt": "a"},\n', 2, "cut short"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt": "\xff"}]', 2, "Not valid UTF-8"),
        ("a.json", b'[{"prompt": "a"}\n] [{"prompt": "b"}]', 2, "has ended, and then comes"),
        ("a.csv", b"prompt,completion,prompt\na,b,c\n", 1, "two columns 'prompt'"),
        ("a.csv", b"prompt,completion\na,b\nc\n", 3, "1 cells, but the header has 2"),
        ("a.csv", b'prompt,completion\na,"b\n', 2, "Not valid CSV"),
        ("a.csv", b"prompt,label\na,maybe\n", 2, "'label' is not valid JSON"),
        ("a.parquet", b"PAR1 but nothing else", 0, "Cannot read the parquet file"),
    ],
)
def test_a_broken_row_says_where_and_what_to_do(tmp_path: Path, name: str, raw: bytes, line: int, message: str) -> None:
    path = write(tmp_path / name, raw)
    with pytest.raises(RowError, match=message) as caught:
        read(path)
    assert caught.value.where == f"{path}:{line}"
    assert caught.value.fix


def test_a_bad_row_can_be_noted_and_reading_goes_on(tmp_path: Path) -> None:
    problems: list[Problem] = []
    path = write(tmp_path / "a.jsonl", GOOD + b"nonsense\n\xff\n" + GOOD)
    assert [source.line for source, _ in read_rows(str(path), problems.append)] == [1, 4]
    assert [(problem.rule, problem.source.line) for problem in problems] == [("json", 2), ("encoding", 3)]


def test_a_truncated_gzip_file_is_an_error_after_its_last_good_line(tmp_path: Path) -> None:
    # Incompressible text, so that a prefix of the file holds a prefix of the lines.
    rows = [{"prompt": "".join(chr(0x4E00 + (i * j * 7919) % 20_000) for j in range(500))} for i in range(200)]
    path = write(tmp_path / "a.jsonl.gz", encode(rows, ".jsonl"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RowError, match="damaged or cut short") as caught:
        read(path)
    assert caught.value.where is not None
    last = int(caught.value.where.rpartition(":")[2])
    assert 0 < last < 200


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_an_empty_file_is_empty_data(tmp_path: Path, name: str) -> None:
    with pytest.raises(EmptyDataError, match="no row"):
        read(write(tmp_path / name, b""))


def test_headers_and_empty_lists_alone_are_empty_data(tmp_path: Path) -> None:
    for name, raw in [("a.csv", b"prompt,completion\n"), ("a.json", b"[ ]"), ("a.jsonl", b"\n\n")]:
        with pytest.raises(EmptyDataError):
            read(write(tmp_path / name, raw))


def test_missing_files_and_unknown_types(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "none.jsonl"), "./none", "none.csv.gz", "a/b/c"):
        with pytest.raises(MissingDataError, match="No such file"):
            read(spec)
    with pytest.raises(DataError, match="Unknown file type") as caught:
        read(write(tmp_path / "notes.txt", b"x"))
    assert ".jsonl" in str(caught.value.fix)
    with pytest.raises(DataError, match="no split 'train'"):
        read(f"{write(tmp_path / 'a.jsonl', GOOD)}:train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingDataError, match="no data file"):
        read(tmp_path / "empty")


def test_a_directory_is_all_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "deep/c.parquet", ".cache/hidden.jsonl"):
        write(tmp_path / name, encode(ROWS[:1], Path(name).suffix))
    write(tmp_path / "README.md", b"not data")
    places = [str(source) for source, _ in read_rows(str(tmp_path))]
    assert places == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.csv:2", f"{tmp_path}/deep/c.parquet:1"]


def test_train_and_test_are_never_read_together(tmp_path: Path) -> None:
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl"):
        write(tmp_path / name, GOOD)
    with pytest.raises(DataError, match="several splits: test, train") as caught:
        read(tmp_path)
    assert f"{tmp_path}:train" in str(caught.value.fix)
    assert len(read(f"{tmp_path}:train")) == 2
    assert len(read(f"{tmp_path}:test")) == 1
    with pytest.raises(MissingDataError, match="no split 'dev'"):
        read(f"{tmp_path}:dev")


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == list(enumerate(ROWS, 1))
    assert read(f"{tmp_path}/two:test") == [(1, ROWS[0])]
    assert next(read_rows(f"{tmp_path}/two:test"))[0].path == f"{tmp_path}/two:test"
    for spec, message in [("two", "several splits"), ("two:dev", "no split 'dev'"), ("one:dev", "has no splits")]:
        with pytest.raises(DataError, match=message):
            read(f"{tmp_path}/{spec}")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="Cannot read this saved data set"):
        read(tmp_path / "one")


def test_a_hub_id_without_the_hub_says_what_to_do() -> None:
    with pytest.raises(MissingDataError, match="cannot be loaded as a hub data set") as caught:
        read("nobody/no-such-data-set:train")
    assert caught.value.where == "nobody/no-such-data-set"
    assert "network" in str(caught.value.fix)


DAMAGE = st.tuples(
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]), st.booleans(), st.integers(0), st.binary(max_size=9)
)


@given(DAMAGE)
def test_damaged_files_give_data_errors_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, damage: tuple[str, bool, int, bytes]
) -> None:
    """Overwrite bytes anywhere in a good file, and cut it there or not: rows or a DataError, never another error."""
    suffix, packed, where, noise = damage
    path = write(tmp_path_factory.mktemp("d") / f"a{suffix}{'.gz' if packed else ''}", encode(ROWS, suffix))
    raw = path.read_bytes()
    at = where % len(raw)
    path.write_bytes(raw[:at] + noise + (raw[at + len(noise) :] if where % 2 else b""))
    problems: list[Problem] = []
    with contextlib.suppress(DataError):
        rows = [row for _, row in read_rows(str(path), problems.append)]
        assert rows or problems
