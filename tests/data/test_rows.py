"""Rows by number: the same rows and places as reading from the start, whatever the file."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from accord.data.problems import Problem
from accord.data.rows import open_rows, size_of
from accord.data.sources import read_rows
from accord.errors import DataError, EmptyDataError, RowError

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1} ü\n"} for n in range(7)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def assert_same_as_reading(spec: str, cache: Path) -> None:
    """Good rows equal those of `read_rows`, bad ones its problems, each at its place; in any order, and once more."""
    problems: list[Problem] = []
    expected = list(read_rows(spec, problems.append))
    for _ in range(2):
        rows = open_rows(spec, cache)
        found = {index: rows.read(index) for index in reversed(range(len(rows)))}
        good = [found[index] for index in range(len(rows)) if not isinstance(found[index][1], Problem)]
        bad = [row for _, row in (found[index] for index in range(len(rows))) if isinstance(row, Problem)]
        assert good == expected
        assert bad == problems


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES.rstrip("\n"),
        LINES.replace("\n{", "\r\n  {"),
        "\n \n" + LINES.replace("\n", "\n\n\t\n"),
        "\ufeff" + LINES,
        LINES + "not json\n[1]\n" + LINES,
        LINES + '\n{"prompt": ',
    ],
    ids=["plain", "no last line end", "indented, dos", "blank lines", "byte order mark", "faults", "cut short"],
)
def test_lines_are_found_by_number(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8", newline="")
    assert_same_as_reading(str(path), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@given(st.lists(st.sampled_from(["", " ", "\r", '{"a": 1}', ' {"a": "\\u00e9"}', "x", "\x0b", "[]"]), max_size=12))
def test_any_mixture_of_blank_good_and_bad_lines(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("mixture") / "a.jsonl"
    path.write_text("\n".join(['{"first": true}', *lines]), newline="")
    assert_same_as_reading(str(path), path.parent)


def test_lines_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    """Blocks of 8 MiB: line ends before, at and behind their borders."""
    path = tmp_path / "long.jsonl"
    sizes = [8 << 20, (8 << 20) - 1, 3, (16 << 20) + 5, 1]
    path.write_text("".join(json.dumps({"text": "x" * (size - 13)}) + "\n" for size in sizes if size > 13))
    rows = open_rows(str(path), tmp_path)
    assert [len(row["text"]) for _, row in map(rows.read, range(len(rows)))] == [s - 13 for s in sizes if s > 13]
    assert size_of(str(path)) == -(-path.stat().st_size // (1 << 20))


@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "csv", "parquet", "folder", "saved"])
def test_other_files_give_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(("\n" + LINES + "oops\n").encode()))
    elif kind == "json":
        path.write_text(json.dumps([*ROWS, 3, ROWS[0]], indent=1))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["prompt", "completion"], *(row.values() for row in ROWS), ["one cell"]])
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=3)
    elif kind == "folder":
        path.mkdir()
        (path / "a.jsonl").write_text(LINES)
        (path / "b.json").write_text(json.dumps(ROWS))
        (path / "c.jsonl").write_text(LINES)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    assert_same_as_reading(str(path), tmp_path / "cache")


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": LINES, "b.jsonl": LINES, "c.jsonl": LINES.replace("3 +", "4 +")}.items():
        (tmp_path / name).write_text(text)
    a, b, c = (open_rows(str(tmp_path / name), tmp_path).hash for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert a == b != c


def test_a_file_that_changes_while_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    rows = open_rows(str(path), tmp_path)
    assert rows.read(2)[1] == ROWS[2]
    path.write_text(LINES.replace("0", "10"))
    with pytest.raises(DataError, match=r"changed while it was in use.*\n.*--resume"):
        rows.read(2)


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(EmptyDataError):
        open_rows(str(tmp_path / "empty.jsonl"), tmp_path)
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(os.urandom(50).hex().encode() + LINES.encode() * 50)[:-20])
    with pytest.raises(RowError, match="cut short"):
        open_rows(str(damaged), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
