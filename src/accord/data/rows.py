"""The rows of a data set by number, read from disk when they are asked for: for data larger than memory.

A plain .jsonl file is read in place, by the byte offsets of its lines. Other files are written once as such lines into
the cache, under the hash of their bytes. A `datasets` data set finds its rows itself.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from accord.data.problems import Problem
from accord.data.sources import Row, data_files, open_dataset, parse_line, read_file, read_lines
from accord.errors import DataError, EmptyDataError
from accord.files import atomic_file
from accord.types import Source

__all__ = ["STREAM_ABOVE", "JoinedRows", "Rows", "open_rows", "size_of"]

STREAM_ABOVE = 20_000
"""Data of more rows than this is not held in memory."""

OnProgress = Callable[[int, int], None]
"""Called with the MiB that were indexed, and the rows that were converted, since the last call."""

_MIB = 1 << 20
_BLOCK = 8
"""MiB that are read at once."""
_ROWS = 1000
"""Converted rows between two calls of `OnProgress`."""


class Rows(ABC):
    """Rows that stay on disk.

    Attributes:
        hash: of the bytes that the rows come from.
        paths: of the sources of the rows.
    """

    hash: str
    paths: list[str]

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are, good and bad."""

    @abstractmethod
    def read(self, index: int) -> tuple[Source, Row | Problem]:
        """Row `index` and its place; or what is wrong with it. Safe to call from several threads."""


def open_rows(spec: str, cache: Path, on_progress: OnProgress = lambda *_: None) -> Rows:
    """The rows that `spec` names (`accord.data.sources.read_rows`), in the same order, blank lines left out.

    Args:
        cache: directory for what can be made again.
        on_progress: hears of what was read; all MiB together are `size_of(spec)`.

    Raises:
        MissingDataError, EmptyDataError, DataError: nothing to read.
        RowError: a file breaks off.
    """
    files = data_files(spec)
    rows: Rows
    if files is None:
        rows = _Dataset(*open_dataset(spec))
    else:
        rows = JoinedRows([_open(path, cache, on_progress) for path in files])
    if not len(rows):
        raise EmptyDataError("There is no row to read.", where=spec, fix="Check that this is the file you meant.")
    return rows


def size_of(spec: str) -> int:
    """MiB that `open_rows` has to read; 0 for what `datasets` keeps."""
    return sum(-(-path.stat().st_size // _MIB) for path in data_files(spec) or ())


class _Lines(Rows):
    """The lines of a .jsonl file. R = rows; blank lines are none."""

    def __init__(self, path: Path, on_progress: OnProgress, original: Path | None = None) -> None:
        self.path, self.paths = path, [str(original or path)]
        self._stamp = _stamp(path)
        self.starts_R, self.blanks, self.size, self.hash = _scan(path, on_progress)

    def __len__(self) -> int:
        return len(self.starts_R)

    def read(self, index: int) -> tuple[Source, Row | Problem]:
        source = self._source(index)
        row = parse_line(self._line(index), source)
        assert row is not None
        return source, row

    def _source(self, index: int) -> Source:
        # Blank line k stands before the rows that follow it: `blanks[k]` is the first of them.
        return Source(self.paths[0], index + 1 + int(np.searchsorted(self.blanks, index, side="right")))

    def _line(self, index: int) -> bytes:
        start = int(self.starts_R[index])
        stop = int(self.starts_R[index + 1]) if index + 1 < len(self) else self.size
        # Not memory-mapped: pages of a mapped file count as memory of the process.
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            line = file.read(stop - start)
        if _stamp(self.path) != self._stamp:
            fix = "Bring the file back as it was and continue with --resume, or start another --out."
            raise DataError("The file was changed while it was in use.", where=str(self.path), fix=fix)
        return line.partition(b"\n")[0]


class _Converted(_Lines):
    """The rows of another file, as lines ``[line, row]`` or ``[line, null, rule, what, fix]``."""

    def read(self, index: int) -> tuple[Source, Row | Problem]:
        line, row, *problem = json.loads(self._line(index))
        source = Source(self.paths[0], line)
        return source, Problem(problem[0], source, problem[1], problem[2]) if problem else row


class JoinedRows(Rows):
    """Several files, one after the other."""

    def __init__(self, parts: Iterable[Rows]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.hash = _digest(part.hash.encode() for part in self.parts)
        self.paths = [path for part in self.parts for path in part.paths]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, index: int) -> tuple[Source, Row | Problem]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part].read(index - (int(self.ends[part - 1]) if part else 0))


class _Dataset(Rows):
    """A data set of `datasets`, which maps its Arrow files into memory."""

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name, self.paths = data, name, [name]
        self.hash = _digest([data._fingerprint.encode(), str(len(data)).encode()])

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Source, Row | Problem]:
        return Source(self.name, index + 1), dict(self.data[index])


def _open(path: Path, cache: Path, on_progress: OnProgress) -> Rows:
    name = path.name.lower()
    if name.endswith(".jsonl"):
        return _Lines(path, on_progress)
    digest = _digest(_blocks(path, on_progress))
    kept = cache / "rows" / f"{digest}{path.suffix.lower()}.jsonl"
    is_packed = name.endswith(".jsonl.gz")
    if not kept.exists():
        with atomic_file(kept) as temporary, temporary.open("wb") as file:
            for number, line in enumerate(_unpack(path) if is_packed else _convert(path), 1):
                file.write(line)
                if number % _ROWS == 0:
                    on_progress(0, _ROWS)
    rows = (_Lines if is_packed else _Converted)(kept, lambda *_: None, path)
    rows.hash = digest
    return rows


def _unpack(path: Path) -> Iterator[bytes]:
    return (raw for _, raw in read_lines(path))


def _convert(path: Path) -> Iterator[bytes]:
    bad: list[Problem] = []
    for source, row in read_file(path, bad.append):
        yield from map(_problem, bad)
        bad.clear()
        yield _line([source.line, row])
    yield from map(_problem, bad)


def _problem(problem: Problem) -> bytes:
    return _line([problem.source.line, None, problem.rule, problem.what, problem.fix])


def _line(values: list[Any]) -> bytes:
    return json.dumps(values, default=_foreign).encode() + b"\n"


def _foreign(value: Any) -> dict[str, str]:
    """A date or bytes in a column: nothing that training reads. Where it does read it, the object is the error."""
    return {"type": type(value).__name__}


def _scan(path: Path, on_progress: OnProgress) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int, str]:
    """Where the rows start, before which rows blank lines stand, the size in bytes, and the hash."""
    state = hashlib.blake2b(digest_size=16)
    found: list[npt.NDArray[np.int64]] = []
    odd: list[int] = []
    size, begins = 0, True
    for block in _blocks(path, on_progress):
        state.update(block)
        data = np.frombuffer(block, np.uint8)
        starts = np.flatnonzero(data == ord("\n")) + 1
        if begins:
            starts = np.concatenate([[0], starts])
        begins = bool(data[-1] == ord("\n"))
        if begins:
            starts = starts[:-1]
        odd += (size + starts[data[starts] != ord("{")]).tolist()
        found.append(size + starts)
        size += len(block)
    starts_L = np.concatenate(found) if found else np.zeros(0, np.int64)
    with path.open("rb") as file:
        blank_starts = [start for start in odd if _is_blank(file, start)]
    lines = np.searchsorted(starts_L, blank_starts)
    return np.delete(starts_L, lines), lines - np.arange(len(lines)), size, state.hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_blank(file: Any, start: int) -> bool:
    file.seek(start)
    raw = file.readline()
    return parse_line(raw, Source(file.name, 1 if start == 0 else 2)) is None


def _blocks(path: Path, on_progress: OnProgress) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK * _MIB):
                yield block
                on_progress(-(-len(block) // _MIB), 0)
    except OSError as error:
        raise DataError(f"Cannot read the file: {error.strerror}.", where=str(path), fix="Check its rights.") from None


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()
