"""Open what `--data` names: a file, a directory or a hub data set. Yields rows with the place each came from.

Files are read as streams of UTF-8. A row that cannot be read is handed to `on_problem` and reading goes on; a file that
breaks off (a truncated .gz, a damaged parquet) raises, because what follows is lost.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accord.data.problems import OnProblem, Problem, fail
from accord.errors import DataError, EmptyDataError, MissingDataError, RowError
from accord.types import Source

__all__ = ["Row", "data_files", "open_dataset", "parse_line", "read_file", "read_lines", "read_rows"]

Row = dict[str, Any]
"""One row as the file holds it: column name to value."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_STRUCTURED_CELLS = frozenset(
    [
        *("messages", "conversations", "completions", "ranks", "answers", "requirements"),
        *("label", "margin", "probability", "ratings"),
    ]
)


def read_rows(spec: str, on_problem: OnProblem = fail) -> Iterator[tuple[Source, Row]]:
    """Yield `(source, row)` of every row that `spec` names, in the order of the files.

    Args:
        spec: a file (.jsonl, .json, .csv, .parquet, each also with .gz), a directory of such files, a directory written
            by `datasets`' `save_to_disk`, or a hub id; a directory and a hub id may name a split: ``name:train``.
        on_problem: called for each row that cannot be read; raises by default.

    Raises:
        MissingDataError: there is no such file, directory or data set.
        EmptyDataError: it holds no row.
        RowError: a row or the rest of a file cannot be read.
        DataError: an unknown file type, or several splits to choose from.
    """
    problems = 0

    def count(problem: Problem) -> None:
        nonlocal problems
        problems += 1
        on_problem(problem)

    empty = True
    for source, row in _open_spec(spec, count):
        empty = False
        yield source, row
    if empty and not problems:
        raise EmptyDataError("There is no row to read.", where=spec, fix="Check that this is the file you meant.")


def data_files(spec: str) -> list[Path] | None:
    """The files that `spec` names, in the order in which they are read; None for a data set that `datasets` keeps.

    Raises:
        MissingDataError: there is no such file or directory, or it holds no data file.
        DataError: an unknown file type, or several splits to choose from.
    """
    place = _place(spec)
    if place is None:
        return None
    path, split = place
    if path.is_dir():
        return None if _is_saved(path) else _files(path, split)
    if _kind(path) is None or split is not None:
        what = f"Unknown file type {path.suffix!r}." if _kind(path) is None else f"A file has no split {split!r}."
        raise DataError(what, where=str(path), fix=f"Accord reads {', '.join(_READERS)}, each also with .gz")
    return [path]


def open_dataset(spec: str) -> tuple[Any, str]:
    """The `datasets` object (of one split) that `spec` names, saved to disk or of the hub, and its name.

    Raises:
        MissingDataError: it cannot be found.
        DataError: it is damaged, or has several splits to choose from.
    """
    place = _place(spec)
    if place is not None:
        return _choose_split(_saved_to_disk(place[0]), str(place[0]), place[1])
    name, _, split = spec.rpartition(":")
    return _choose_split(_hub(name or spec), name or spec, split if name else None)


def parse_line(raw: bytes, source: Source) -> Row | Problem | None:
    """One line of a .jsonl file as a row, or what is wrong with it; None if it is blank."""
    text = _decode(raw, source)
    if isinstance(text, Problem):
        return text
    return _parse(text, source) if text.strip() else None


def _open_spec(spec: str, on_problem: OnProblem) -> Iterator[tuple[Source, Row]]:
    files = data_files(spec)
    if files is not None:
        return (row for file in files for row in read_file(file, on_problem))
    data, name = open_dataset(spec)
    return ((Source(name, number), dict(row)) for number, row in enumerate(data, 1))


def read_file(path: Path, on_problem: OnProblem) -> Iterator[tuple[Source, Row]]:
    """Yield the rows of one of `data_files`."""
    return _READERS[_kind(path) or ""](path, on_problem)


def _place(spec: str) -> tuple[Path, str | None] | None:
    """The file or directory that `spec` names, and the split; None if it names a hub data set."""
    name, _, split = spec.rpartition(":")
    whole, part = Path(spec).expanduser(), Path(name).expanduser()
    if whole.exists():
        return whole, None
    if name and part.exists():
        return part, split
    if _looks_like_path(spec):
        fix = f"Check the path; the working directory is {Path.cwd()}"
        raise MissingDataError("No such file or directory.", where=spec, fix=fix)
    return None


def _is_saved(directory: Path) -> bool:
    return (directory / "dataset_dict.json").exists() or (directory / "state.json").exists()


def _looks_like_path(spec: str) -> bool:
    is_hub_id = _HUB_ID.fullmatch(spec.partition(":")[0]) is not None
    return not is_hub_id or spec.startswith((".", "/", "~")) or _kind(Path(spec)) is not None


def _files(directory: Path, split: str | None) -> list[Path]:
    """The data files of a directory, sorted; of one split if it has several (never train and test together)."""
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if _kind(path) and path.is_file() and not any(p.startswith(".") for p in path.relative_to(directory).parts)
    ]
    if not files:
        raise MissingDataError(
            "The directory holds no data file.", where=str(directory), fix=f"Accord reads {', '.join(_READERS)} (.gz)"
        )
    splits = {path: _split_name(path) for path in files}
    names = sorted({name for name in splits.values() if name})
    if split is not None:
        chosen = [path for path in files if splits[path] == split or path.name.partition(".")[0] == split]
        if not chosen:
            raise MissingDataError(
                f"The directory has no split {split!r}.", where=str(directory), fix=f"It has: {', '.join(names) or '-'}"
            )
        return chosen
    if len(names) > 1:
        raise _which_split(str(directory), names)
    return files


def _split_name(path: Path) -> str | None:
    word = re.split(r"[-_.]", path.name.lower())[0]
    return word if word in _SPLIT_NAMES else None


def _which_split(name: str, splits: list[str]) -> DataError:
    what = f"There are several splits: {', '.join(splits)}."
    return DataError(what, where=name, fix=f"Say which, e.g. {name}:{'train' if 'train' in splits else splits[0]}")


def _kind(path: Path) -> str | None:
    """The suffix that decides the reader (``.jsonl`` for ``x.jsonl.gz``), or None."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _READERS if name.endswith(suffix)), None)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered raw lines of a plain or gzip file; a damaged one is a RowError at the last good line."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"The compressed file is damaged or cut short after line {number}: {error}."
        fix = "Copy or download it again; `gzip -t` tests a file."
        raise RowError(what, where=f"{path}:{number}", fix=fix) from None
    except OSError as error:
        raise DataError(f"Cannot read the file: {error.strerror}.", where=str(path), fix="Check its rights.") from None


def _decode(raw: bytes, source: Source) -> str | Problem:
    try:
        return raw.decode("utf-8-sig" if source.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        what = f"Not valid UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line."
        return Problem("encoding", source, what, "Convert the file: iconv -f LATIN1 -t UTF-8 (if it is Latin-1)")


def _parse(text: str, source: Source) -> Row | Problem:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Problem("json", source, f"Not valid JSON: {_reason(error)}.", "Write one JSON object per line.")
    return _object(value, source)


def _reason(error: Exception) -> str:
    """What is wrong with a text in JSON; its line is that of the row, which the place says."""
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _object(value: Any, source: Source) -> Row | Problem:
    if isinstance(value, dict):
        return value
    what = f"A row must be a JSON object with named columns, not {_json_type(value)}."
    return Problem("json", source, what, 'Write e.g. {"prompt": "...", "completion": "..."}')


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _read_jsonl(path: Path, on_problem: OnProblem) -> Iterator[tuple[Source, Row]]:
    for number, raw in read_lines(path):
        source = Source(str(path), number)
        row = parse_line(raw, source)
        if isinstance(row, Problem):
            on_problem(row)
        elif row is not None:
            yield source, row


def _read_json(path: Path, on_problem: OnProblem) -> Iterator[tuple[Source, Row]]:
    """A JSON array of objects (or objects one after the other), each with the line on which it starts."""
    lines: list[str] = []
    for number, raw in read_lines(path):
        line = _decode(raw, Source(str(path), number))
        if isinstance(line, Problem):
            raise line.error
        lines.append(line)
    text = "".join(lines)
    decoder = json.JSONDecoder()
    is_array = text.lstrip().startswith("[")
    position = text.index("[") + 1 if is_array else 0
    number = 1 + text.count("\n", 0, position)
    while True:
        start = _next_value(text, position)
        number += text.count("\n", position, start)
        source = Source(str(path), number)
        if start == len(text) or (is_array and text[start] == "]"):
            if is_array:
                _require_end(text[start:], source)
            return
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            fix = "Write an array of objects, or one object per line in a .jsonl file."
            raise RowError(f"Not valid JSON: {error}.", where=str(source), fix=fix) from None
        number += text.count("\n", start, position)
        row = _object(value, source)
        if isinstance(row, Problem):
            on_problem(row)
        else:
            yield source, row


def _require_end(rest: str, source: Source) -> None:
    """What is left of the text where an array should end: its bracket, and nothing after it."""
    if not rest:
        raise RowError("The JSON array is cut short: no closing ].", where=str(source), fix="Copy it again.")
    if rest[1:].strip():
        what = f"The JSON array has ended, and then comes {rest[1:].strip()!r:.40}."
        fix = "Write one array of objects, or one object per line in a .jsonl file."
        raise RowError(what, where=str(source), fix=fix)


def _next_value(text: str, position: int) -> int:
    gap = re.compile(r"[\s,]*").match(text, position)
    return gap.end() if gap else position


def _read_csv(path: Path, on_problem: OnProblem) -> Iterator[tuple[Source, Row]]:
    """Comma-separated values with a header line; cells of structured columns (messages, label, ...) hold JSON."""
    csv.field_size_limit(sys.maxsize)

    def lines() -> Iterator[str]:
        for number, raw in read_lines(path):
            line = _decode(raw, Source(str(path), number))
            if isinstance(line, Problem):
                raise line.error
            yield line

    reader = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    while True:
        source = Source(str(path), reader.line_num + 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fix = "Close every quoted cell, and double the quotes inside it."
            raise RowError(f"Not valid CSV: {error}.", where=str(source), fix=fix) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, source)
        elif len(cells) != len(header):
            what = f"{len(cells)} cells, but the header has {len(header)}."
            on_problem(Problem("csv", source, what, "Quote cells that hold commas or line breaks."))
        else:
            row = _csv_row(header, cells, source)
            if isinstance(row, Problem):
                on_problem(row)
            else:
                yield source, row


def _header(cells: list[str], source: Source) -> list[str]:
    twice = next((name for name, count in Counter(cells).items() if count > 1), None)
    if twice is not None:
        fix = "Rename or remove one of them."
        raise RowError(f"The header has two columns {twice!r}.", where=str(source), fix=fix)
    return cells


def _csv_row(header: list[str], cells: list[str], source: Source) -> Row | Problem:
    row: Row = {}
    for name, cell in zip(header, cells, strict=True):
        is_structured = name in _STRUCTURED_CELLS or cell.startswith(('[{"role":', '[{"from":'))
        if not is_structured:
            row[name] = cell
            continue
        try:
            row[name] = json.loads(cell.lower() if name == "label" else cell) if cell else None
        except (ValueError, RecursionError) as error:
            what = f"The cell {name!r} is not valid JSON: {_reason(error)}."
            example = "true or false" if name == "label" else '[{"role": "user", "content": "..."}]'
            return Problem("csv", source, what, f"Write it as JSON, e.g. {example}")
    return row


def _read_parquet(path: Path, _on_problem: OnProblem) -> Iterator[tuple[Source, Row]]:
    """Rows of a parquet file; the "line" is the row number from 1."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        packed = path.name.lower().endswith(".gz")
        file = parquet.ParquetFile(io.BytesIO(b"".join(raw for _, raw in read_lines(path))) if packed else str(path))
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Source(str(path), number), row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"Cannot read the parquet file after row {number}: {_first_line(error)}"
        raise RowError(what, where=f"{path}:{number}", fix="Copy or download it again.") from None


_READERS: Mapping[str, Callable[[Path, OnProblem], Iterator[tuple[Source, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _saved_to_disk(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` raises many types here; each means that the directory is damaged
        what = f"Cannot read this saved data set: {_first_line(error)}"
        raise DataError(what, where=str(path), fix="Save it again with `save_to_disk`.") from None


def _hub(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name)
    except Exception as error:  # network, hub, cache and schema errors come in a dozen types from four packages
        raise MissingDataError(
            f"Not a file or directory here, and it cannot be loaded as a hub data set: {_first_line(error)}",
            where=name,
            fix="Check the name and the network (offline, only data sets already in the cache load), or give a file.",
        ) from None


def _choose_split(data: Any, name: str, split: str | None) -> tuple[Any, str]:
    if isinstance(data, dict):
        names = list(data)
        if split is None and len(names) > 1:
            raise _which_split(name, names)
        split = split or names[0]
        if split not in data:
            raise MissingDataError(f"There is no split {split!r}.", where=name, fix=f"It has: {', '.join(names)}")
        return data[split], f"{name}:{split}"
    if split is not None:
        raise MissingDataError("This data set has no splits.", where=f"{name}:{split}", fix=f"Write {name}")
    return data, name


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
