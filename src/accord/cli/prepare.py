"""`accord data convert`, `split`, `mix` and `dedup`: from data as it comes to the files that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accord.data.usable import Kind

if TYPE_CHECKING:
    from accord.data.write import Changes

__all__ = ["convert", "dedup", "mix", "split"]


def convert(*, data: str, out: Path, to: Kind | None = None) -> None:
    """Write data of any format in Accord's own columns; rows that cannot be used are dropped and listed.

    Parameters
    ----------
    data
        File (jsonl, csv, parquet, also .gz), directory, or hub id; DATA#FORMAT says how to read it.
    out
        New .jsonl file. What was dropped, and why, is listed in OUT.changes.
    to
        demonstrations: imitate the chosen side of every pair, the best of every ranking, and what has a thumb up.
        labels: the chosen side of a pair is good, the rejected one bad. prompts: the prompt of every row.
        preferences, ratings: only such records. Without it, every record as it is.
    """
    from accord.data.convert import convert as write

    _say(write(data, out, to), out)


def split(*, data: str, out: Path, test: float = 0.1, seed: int = 0) -> None:
    """Divide data into train and test by conversation: the same first user turn is never on both sides.

    Parameters
    ----------
    data
        File (jsonl, csv, parquet, also .gz), directory, or hub id.
    out
        New directory, for train.jsonl and test.jsonl.
    test
        Expected share of conversations on the test side.
    seed
        Another seed divides otherwise; the same one divides every data set alike.
    """
    from accord.data.split import split as write

    parts = write(data, out, test, seed)
    print(parts.changes.summary())
    print(f"{out / 'train.jsonl'}: {parts.train:,} rows")
    print(f"{out / 'test.jsonl'}: {parts.test:,} rows ({parts.test / (parts.train + parts.test):.1%})")


def mix(*, data: tuple[str, ...], out: Path, rows: int | None = None, seed: int = 0, again: bool = False) -> None:
    """Draw rows of several data sets in given shares, evenly interleaved.

    Parameters
    ----------
    data
        DATA=WEIGHT, once for each data set, e.g. --data a.jsonl=0.7 --data b.jsonl=0.3
    out
        New .jsonl file.
    rows
        How many rows to write; as many as the shares allow if not given.
    seed
        Which rows are drawn, and in which order they alternate.
    again
        Draw rows of a data set that is too small for its share more than once.
    """
    from accord.data.mix import mix as write
    from accord.data.mix import read_shares

    parts = write(read_shares(data), out, rows, seed, again=again)
    total = sum(part.drawn for part in parts.values())
    for spec, part in parts.items():
        times = f", {part.drawn / part.rows:.2f} times" if part.drawn > part.rows else ""
        print(
            f"{spec}: {part.changes.summary()}; {part.drawn:,} drawn ({part.drawn / total:.1%} of the mixture{times})"
        )
    print(f"{out}: {total:,} rows")


def dedup(*, data: str, out: Path, near: float | None = None) -> None:
    """Write data without repetitions: the first of equal rows stays.

    Parameters
    ----------
    data
        File (jsonl, csv, parquet, also .gz), directory, or hub id.
    out
        New .jsonl file. What was dropped, and the row it repeats, is listed in OUT.changes.
    near
        Also drop rows whose prompt and completions all resemble those of an earlier row at least so much, from 0 to 1:
        the estimated share of common five-word runs. 0.8 is usual.
    """
    from accord.data.dedup import dedup as write

    _say(write(data, out, near), out)


def _say(changes: Changes, out: Path) -> None:
    print(changes.summary())
    from accord.data.write import changes_of

    listed = changes_of(out)
    print(f"{out}" + (f"; what was dropped or left out: {listed}" if listed.exists() else ""))
