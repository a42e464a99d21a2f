"""Train and test parts that share no conversation: all rows with the same first user turn go to one side."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from accord.data.convert import good_rows
from accord.data.formats import split_format
from accord.data.usable import prompt_of, squash
from accord.data.write import Changes, new_file
from accord.errors import ConfigError, DataError, EmptyDataError, RunError
from accord.files import atomic_directory
from accord.types import Record

__all__ = ["Parts", "root", "split", "without_format"]


class Parts(NamedTuple):
    """Rows on either side, and what became of the others.

    Example: ``Parts(train=90, test=10, changes=Changes())``
    """

    train: int
    test: int
    changes: Changes


def root(record: Record) -> str:
    """The first user turn of a record's prompt, in one case and spacing; a plain prompt as a whole.

    Example:
        >>> root(Demonstration((Message("user", "Hi  there"), Message("assistant", "Hello")), "Bye"))
        'hi there'
    """
    prompt = prompt_of(record)
    if not isinstance(prompt, str):
        prompt = next((turn.content for turn in prompt if turn.role == "user"), prompt[0].content)
    return squash(prompt).casefold()


def split(spec: str, out: Path, test: float = 0.1, seed: int = 0) -> Parts:
    """Write ``train.jsonl`` and ``test.jsonl`` into a new directory; the rows stay as they are.

    The side of a row is a function of its root and the seed alone, so it stays the same when rows are added, and the
    same root falls on the same side in every data set that is split with this seed. `test` is the expected share of
    roots on the test side.

    Raises:
        ConfigError: `test` is not between 0 and 1, or a format is named.
        RunError: the directory exists.
        EmptyDataError: one side would be empty.
    """
    if not 0 < test < 1:
        raise ConfigError(f"A test part of {test:g} leaves no split.", where="--test", fix="Give e.g. 0.1")
    if out.exists():
        raise RunError("This directory exists.", where=str(out), fix="Choose another directory with --out.")
    without_format(spec)
    changes = Changes()
    with atomic_directory(out) as folder:
        try:
            with new_file(folder / "train.jsonl") as left, new_file(folder / "test.jsonl") as right:
                for source, row, records in good_rows(spec, changes):
                    side = right if _share(root(records[0]), seed) < test else left
                    side.write(row, source)
                    changes.keep()
        except EmptyDataError as error:
            if not changes.rows:
                raise
            what = f"The {Path(error.where or '').stem} part would be empty; {changes.summary()}."
            fix = "Give more rows, a --test nearer to 0.5, or another --seed."
            raise EmptyDataError(what, where=spec, fix=fix) from None
        changes.write(folder / "changes")
    return Parts(left.count, right.count, changes)


def without_format(spec: str) -> None:
    """Refuse a named format where rows are written as they are: the file could not say how it is to be read.

    Raises:
        DataError: the data is written as ``DATA#FORMAT``.
    """
    _, name = split_format(spec)
    if name is not None:
        fix = f"First write them in Accord's columns: accord data convert --data '{spec}' --out NEW.jsonl"
        raise DataError(f"The rows would lose that they are to be read as {name!r}.", where=spec, fix=fix)


def _share(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the text and the seed."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
