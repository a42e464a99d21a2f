"""Training data that does not fit into memory: rows are rendered a few steps ahead of their use, and kept on disk.

The order of the rows is the loop's: which rows a step trains on is a function of the seed and the step alone, whatever
the timing of the threads. So a run on rows that stream has the same bits as one on rows in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

import accord
from accord.data.formats import split_format
from accord.data.load import select
from accord.data.mix import MixedRows
from accord.data.problems import Problem
from accord.data.rows import Rows, open_rows, size_of
from accord.data.usable import Kind
from accord.engine.distributed import rank
from accord.errors import RowError
from accord.files import disk_errors
from accord.models.render import Renderer, signature
from accord.models.starter import cache_directory
from accord.models.trees import Branch, Tree
from accord.tracking import Progress
from accord.types import Record, Source

__all__ = ["StreamedTrees", "TokenCache", "Trees", "batches", "render", "stream"]

_AHEAD = 4
"""Steps whose rows are rendered before they are needed."""
_CHUNK = 1000
"""Records that are encoded in one call."""
_CACHE_LIMIT = 20e9
"""Bytes that all token caches together may take; the ones unused for longest go first."""


class StreamedTrees:
    """The trees of a data set on disk, made when they are asked for.

    Args:
        rows: where the data stands.
        kind: what is wanted of a row; a row of several such records gives several trees.
        name: the format of the rows, where their columns do not decide.
        renderer: makes trees of records.
        cache: directory for what can be made again.
        skipped: leave out rows that cannot be used and list them in this file, instead of failing.

    Attributes:
        rendered: rows that went through the tokenizer; the others were found in the cache.
        truncated: rows used so far of which a completion was cut.
    """

    def __init__(
        self,
        rows: Rows,
        kind: Kind,
        renderer: Renderer,
        cache: Path,
        name: str | None = None,
        skipped: Path | None = None,
    ) -> None:
        self.rows, self.kind, self.name, self.renderer = rows, kind, name, renderer
        self.rendered = 0
        self._cut_R = np.zeros(len(rows), np.bool_)
        self._skipped = _SkippedRows(skipped) if skipped else None
        self._cache = TokenCache(cache / "tokens" / self._key(), rows.paths)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    @property
    def truncated(self) -> int:
        return int(self._cut_R.sum())

    @property
    def skipped(self) -> int:
        """Rows that were left out."""
        return len(self._skipped.known) if self._skipped else 0

    def close(self) -> None:
        """Close the cache; no tree can be had afterwards."""
        self._cache.close()

    def batch(self, indices: Sequence[int]) -> list[Tree]:
        """The trees of these rows, in this order.

        Raises:
            RowError: a row cannot be used, and no file for skipped rows was given.
            DataError: the file was changed.
        """
        with self._lock:
            found = self._cache.read(indices)
            made = self._render([index for index in dict.fromkeys(indices) if index not in found])
            self._cache.write(made)
            found |= made
            for index, trees in found.items():
                self._cut_R[index] = any(branch.truncated for tree in trees for branch in tree.branches)
        return [tree for index in indices for tree in found.get(index, ())]

    def _render(self, indices: Sequence[int]) -> dict[int, list[Tree]]:
        self.rendered += len(indices)
        records: list[tuple[int, Record]] = []
        bad: dict[int, Problem] = {}
        for index in indices:
            source, row = self.rows.read(index)
            selected = row if isinstance(row, Problem) else select(row, source, self.kind, self.name)
            if isinstance(selected, Problem):
                bad[index] = selected
            else:
                records += [(index, record) for record in selected]
        made: dict[int, list[Tree]] = {}
        trees = self.renderer.trees([record for _, record in records])
        for (index, record), tree in zip(records, trees, strict=True):
            if isinstance(tree, RowError):
                bad[index] = Problem("render", record.source or Source(self.rows.paths[0], 0), tree.what, tree.fix)
            else:
                made.setdefault(index, []).append(tree)
        for index, problem in bad.items():
            made.pop(index, None)
            self._leave_out(index, problem)
        return made

    def _leave_out(self, index: int, problem: Problem) -> None:
        if self._skipped is None:
            ways = [problem.fix] if problem.fix else []
            ways.append("To go on without such rows: the same command with --resume --skip-bad")
            ways.append(
                "A mended file is other data: it needs another --out. `accord data check` finds all faults first."
            )
            raise RowError(problem.what, where=str(problem.source), fix="\n  → ".join(ways))
        self._skipped.add(index, problem)

    def _key(self) -> str:
        """Everything that decides what a row becomes: the data, the tokenizer, the limits, and our own code."""
        renderer = self.renderer
        state = hashlib.blake2b(digest_size=16)
        for part in (
            self.rows.hash,
            self.kind,
            self.name or "",
            *signature(renderer.tokenizer),
            repr((renderer.max_tokens, renderer.stop_ids.tolist(), renderer.tokenizer.eos_token_id)),
            _code(),
        ):
            state.update(len(part).to_bytes(8, "little") + part.encode())
        return state.hexdigest()


Trees = Sequence[Tree] | StreamedTrees
"""Training data, in memory or on disk: `len` says how many rows there are."""


def batches(trees: Trees, order: Iterable[Sequence[int]]) -> Generator[list[Tree], None, None]:
    """The trees of each step, given the rows of each step.

    Streamed rows are made by one thread of low priority, a few steps ahead. What goes wrong with a row of a step is
    raised when that step is asked for, not before.
    """
    if not isinstance(trees, StreamedTrees):
        for indices in order:
            yield [trees[index] for index in indices]
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="render", initializer=_step_back)
    waiting: deque[Future[list[Tree]]] = deque()
    try:
        for indices in order:
            waiting.append(pool.submit(trees.batch, indices))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def stream(
    data: str | Mapping[str, float], kind: Kind, renderer: Renderer, skipped: Path | None = None, seed: int = 0
) -> StreamedTrees:
    """Index the data with progress; see `StreamedTrees`.

    Args:
        data: a data set, or several and their shares, which are drawn with the seed.

    Raises:
        MissingDataError, EmptyDataError, DataError: nothing to read.
    """
    places, name = [*data], None
    if isinstance(data, str):
        place, name = split_format(data)
        places = [place]
    with Progress("Index data", sum(map(size_of, places)), unit="converted rows", quiet=rank() > 0) as progress:
        parts = {
            place: open_rows(place, cache_directory(), lambda mib, count: progress.advance(mib, work=count))
            for place in places
        }
    rows = parts[places[0]] if isinstance(data, str) else MixedRows(parts, data, seed)
    return StreamedTrees(rows, kind, renderer, cache_directory(), name, skipped)


def render(renderer: Renderer, records: Sequence[Record], skipped: list[RowError] | None = None) -> list[Tree]:
    """Records as trees, all at once.

    Args:
        skipped: takes what is wrong with records that cannot be used, which are then left out.

    Raises:
        RowError: a record cannot be used, and there is no `skipped`; or none can be used.
    """
    trees: list[Tree] = []
    for start in range(0, len(records), _CHUNK):
        for tree in renderer.trees(records[start : start + _CHUNK]):
            if not isinstance(tree, RowError):
                trees.append(tree)
            elif skipped is None:
                raise tree
            else:
                skipped.append(tree)
    if skipped and not trees:
        raise skipped[0]
    return trees


class _SkippedRows:
    """A file that lists each row that was left out once, with its place and the reason; a resumed run adds to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.known = {json.loads(line)["row"] for line in lines}

    def add(self, index: int, problem: Problem) -> None:
        if index in self.known:
            return
        self.known.add(index)
        if rank() > 0:
            return
        row = {"row": index, "source": str(problem.source), "rule": problem.rule, "what": problem.what}
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class TokenCache:
    """Trees by row number, in an SQLite file of a directory of its own; deleting the directory costs time only.

    A process that is killed while it writes leaves what stood there before. Where the file is damaged or the disk is
    full, nothing more is kept, and the rows are made anew.

    Args:
        paths: where the rows come from; a cached row tells which of them.
    """

    def __init__(self, directory: Path, paths: Sequence[str]) -> None:
        self.paths = paths
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            os.utime(directory)
        _make_room(directory)
        self._file = sqlite3.connect(directory / "trees.sqlite", timeout=60, check_same_thread=False)
        with suppress(sqlite3.DatabaseError):
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS trees (row INTEGER PRIMARY KEY, bytes BLOB NOT NULL)")

    def read(self, indices: Sequence[int]) -> dict[int, list[Tree]]:
        """The trees of those rows that are there."""
        found = {}
        with suppress(sqlite3.DatabaseError):
            for index in indices:
                row = self._file.execute("SELECT bytes FROM trees WHERE row = ?", (index,)).fetchone()
                if row is not None:
                    found[index] = _decode(row[0], self.paths)
        return found

    def write(self, made: Mapping[int, Sequence[Tree]]) -> None:
        """Keep the trees of these rows, all or none."""
        rows = [(index, _encode(trees, self.paths)) for index, trees in made.items()]
        with suppress(sqlite3.DatabaseError), self._file:
            self._file.executemany("INSERT OR REPLACE INTO trees VALUES (?, ?)", rows)

    def close(self) -> None:
        self._file.close()


_TREE = tuple(field.name for field in fields(Tree) if field.name not in ("prompt_P", "branches", "controls", "source"))


def _encode(trees: Sequence[Tree], paths: Sequence[str]) -> bytes:
    """A line of JSON that says what follows, then tokens (int32) and masks (one byte each)."""
    head = [
        {
            "prompt": len(tree.prompt_P),
            "branches": [[len(branch.tokens_L), branch.truncated] for branch in tree.branches],
            "source": [paths.index(tree.source.path), tree.source.line] if tree.source else None,
            **{name: getattr(tree, name) for name in _TREE},
        }
        for tree in trees
    ]
    parts = [json.dumps(head).encode() + b"\n"]
    for tree in trees:
        parts.append(tree.prompt_P.astype(np.int32).tobytes())
        for branch in tree.branches:
            parts += [branch.tokens_L.astype(np.int32).tobytes(), branch.loss_mask_L.tobytes()]
    return b"".join(parts)


def _decode(data: bytes, paths: Sequence[str]) -> list[Tree]:
    at = data.index(b"\n") + 1

    def take(count: int, kind: Any) -> Any:
        nonlocal at
        array = np.frombuffer(data, kind, count, at)
        at += array.nbytes
        return array

    trees = []
    for head in json.loads(data[:at]):
        prompt_P = take(head["prompt"], np.int32).astype(np.int64)
        branches = tuple(
            Branch(take(length, np.int32).astype(np.int64), take(length, np.bool_).copy(), truncated=truncated)
            for length, truncated in head["branches"]
        )
        source = Source(paths[head["source"][0]], head["source"][1]) if head["source"] else None
        rest: dict[str, Any] = {
            name: tuple(head[name]) if isinstance(head[name], list) else head[name] for name in _TREE
        }
        trees.append(Tree(prompt_P, branches, source=source, **rest))
    return trees


def _make_room(mine: Path) -> None:
    """Delete the token caches that were not opened for longest until the others fit into the limit."""
    sizes = {
        directory: sum(file.stat().st_size for file in directory.iterdir())
        for directory in mine.parent.iterdir()
        if directory.is_dir()
    }
    total = sum(sizes.values())
    for directory in sorted(sizes, key=lambda each: each.stat().st_mtime):
        if total > _CACHE_LIMIT and directory != mine:
            total -= sizes[directory]
            shutil.rmtree(directory, ignore_errors=True)


def _step_back() -> None:
    """Let the training step go first (Linux: a thread has a priority of its own)."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _code() -> str:
    """A hash of the code that decides which tokens a row becomes."""
    root = Path(accord.__file__).parent
    files = [*sorted((root / "data").rglob("*.py")), root / "models" / "render.py", Path(__file__)]
    return hashlib.blake2b(b"".join(path.read_bytes() for path in files), digest_size=16).hexdigest()
