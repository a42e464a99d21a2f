"""Several data sets in given shares: rows drawn by seed, without replacement unless asked, and evenly interleaved.

Which rows are drawn, and in which order, depends on the shares, the sizes and the seed alone: `mix` writes them to a
file, training reads them where they are (`mixed_order`, `MixedRows`), and both learn the same from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from accord.data.convert import good_rows
from accord.data.problems import Problem
from accord.data.rows import JoinedRows, Rows
from accord.data.sources import Row
from accord.data.split import without_format
from accord.data.write import Changes, new_file
from accord.errors import ConfigError, DataError
from accord.types import Record, Source

__all__ = ["MixedRows", "Part", "check_shares", "mix", "mix_records", "read_shares"]

IntArray = NDArray[np.int64]


class Part(NamedTuple):
    """How much of one data set is in the mixture.

    Example: ``Part(rows=1000, drawn=700, changes=Changes())``
    """

    rows: int
    drawn: int
    changes: Changes


def mix(
    weights: Mapping[str, float], out: Path, rows: int | None = None, seed: int = 0, *, again: bool = False
) -> dict[str, Part]:
    """Write a mixture to a new .jsonl file; the rows stay as they are.

    Args:
        weights: the share of each data set, by its name; they need not sum to 1.
        rows: how many rows to write; as many as the shares allow if not given.
        again: draw the rows of a data set that is too small for its share several times, all equally often but for one.

    Raises:
        ConfigError: a weight that is not positive, `rows` under 1, a seed below 0, or `again` without `rows`.
        DataError: a data set is too small for its share, or part of `rows` rounds to none.
        RunError: the file exists.
    """
    weights = check_shares(weights)
    if rows is not None and rows < 1:
        raise ConfigError(f"A mixture of {rows} rows is none.", where="--rows", fix="Give 1 or more, or leave it out.")
    if seed < 0:
        raise ConfigError(f"A seed of {seed} is below 0.", where="--seed", fix="Give 0 or more.")
    if again and rows is None:
        raise ConfigError("Drawing rows again has no end by itself.", where="--again", fix="Say how many: --rows 1000")
    whole = Changes()
    with new_file(out, whole) as file:
        changes = {spec: Changes() for spec in weights}
        sizes = {spec: sum(1 for _ in good_rows(spec, changes[spec])) for spec in weights}
        draws, turns = _draw(weights, sizes, seed, rows, again=again)
        for spec, each in changes.items():
            each.rows += sizes[spec]
            each.kept += sizes[spec]
            whole.extend(each)
        streams = [draw.of(spec) for spec, draw in draws.items()]
        for turn in turns:
            source, row = next(streams[turn])
            file.write(row, source)
    return {spec: Part(sizes[spec], draws[spec].drawn, changes[spec]) for spec in weights}


def mix_records(
    records: Mapping[str, Sequence[Record]], weights: Mapping[str, float], seed: int
) -> tuple[list[Record], dict[str, int]]:
    """The same mixture of records in memory, and how many rows of each data set are in it.

    A row is drawn with all its records.

    Raises:
        ConfigError, DataError: as `mix`.
    """
    weights = check_shares(weights)
    rows = {spec: [list(row) for _, row in groupby(records[spec], lambda record: record.source)] for spec in weights}
    order_R, counts = _order(weights, {spec: len(each) for spec, each in rows.items()}, seed)
    flat = list(chain.from_iterable(rows.values()))
    return [record for index in order_R for record in flat[index]], counts


class MixedRows(Rows):
    """A mixture that stays on disk.

    Args:
        parts: all rows of each data set; bad ones count, as nobody has looked at them.

    Attributes:
        counts: how many rows of each data set are in it.
    """

    def __init__(self, parts: Mapping[str, Rows], weights: Mapping[str, float], seed: int) -> None:
        weights = check_shares(weights)
        self._all = JoinedRows([parts[spec] for spec in weights])
        self._order_R, self.counts = _order(weights, {spec: len(parts[spec]) for spec in weights}, seed)
        self.paths = self._all.paths
        self.hash = hashlib.blake2b(self._all.hash.encode() + self._order_R.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._order_R)

    def read(self, index: int) -> tuple[Source, Row | Problem]:
        return self._all.read(int(self._order_R[index]))


def read_shares(assignments: Sequence[str]) -> dict[str, float]:
    """Weights as they are typed, ``["a.jsonl=0.7", "b.jsonl=0.3"]``, by data set.

    Raises:
        ConfigError: one has no weight, or is given twice.
    """
    weights: dict[str, float] = {}
    for assignment in assignments:
        spec, _, number = assignment.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = None
        if not spec or weight is None:
            raise ConfigError(f"{assignment!r} has no weight.", where="--data", fix="Write e.g. --data a.jsonl=0.7")
        if spec in weights:
            fix = "Give it once, with the sum of its weights."
            raise ConfigError(f"{spec!r} is given twice.", where="--data", fix=fix)
        weights[spec] = weight
    return weights


def check_shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights in an order of their own, so that a mixture does not depend on which data set is named first.

    Raises:
        ConfigError: a weight is not positive.
        DataError: the format of a data set is named.
    """
    if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
        raise ConfigError("Every weight must be positive.", where="--data", fix="Write e.g. --data a.jsonl=0.7")
    for spec in weights:
        without_format(spec)
    return dict(sorted(weights.items()))


class _Draw(NamedTuple):
    """Every row `passes` times, and some of them once more."""

    passes: int
    once_more_R: NDArray[np.bool_]

    @property
    def drawn(self) -> int:
        return self.passes * len(self.once_more_R) + int(self.once_more_R.sum())

    def of(self, spec: str) -> Iterator[tuple[Source, Row]]:
        """The rows in the order of the file."""
        whole = chain.from_iterable(_rows(spec) for _ in repeat(None, self.passes))
        return chain(whole, (item for item, taken in zip(_rows(spec), self.once_more_R, strict=True) if taken))


def _order(weights: Mapping[str, float], sizes: Mapping[str, int], seed: int) -> tuple[IntArray, dict[str, int]]:
    """The rows of the mixture, numbered through all data sets: [rows]; and how many each has in it."""
    draws, turns = _draw(weights, sizes, seed)
    order_R, start = np.empty(len(turns), np.int64), 0
    for turn, (spec, draw) in enumerate(draws.items()):
        order_R[turns == turn] = start + np.flatnonzero(draw.once_more_R | (draw.passes > 0))
        start += sizes[spec]
    return order_R, {spec: draw.drawn for spec, draw in draws.items()}


def _draw(
    weights: Mapping[str, float], sizes: Mapping[str, int], seed: int, rows: int | None = None, *, again: bool = False
) -> tuple[dict[str, _Draw], IntArray]:
    """What is drawn of each part, and the place among the parts of every row of the mixture: [rows]."""
    generator = np.random.default_rng(seed)
    counts = _counts(weights, sizes, rows, again)
    draws = {}
    for spec in weights:
        passes, rest = divmod(counts[spec], sizes[spec])
        once_more_R: NDArray[np.bool_] = np.zeros(sizes[spec], bool)
        once_more_R[generator.choice(sizes[spec], rest, replace=False)] = True
        draws[spec] = _Draw(passes, once_more_R)
    turns = np.repeat(np.arange(len(draws)), [counts[spec] for spec in weights])
    return draws, generator.permutation(turns)


def _counts(weights: Mapping[str, float], sizes: Mapping[str, int], rows: int | None, again: bool) -> dict[str, int]:
    """How many rows of each part: in proportion to the weights, the rounding by largest remainder."""
    total = sum(weights.values())
    shares = {spec: weight / total for spec, weight in weights.items()}
    most = min(sizes[spec] / share for spec, share in shares.items())
    wanted = int(most + 1e-9) if rows is None else rows
    if wanted > most + 1 and not again:
        short = min(shares, key=lambda spec: sizes[spec] / shares[spec])
        what = f"{sizes[short]:,} rows are too few for {shares[short]:.1%} of {wanted:,}."
        fix = (
            f"Ask for at most --rows {int(most):,}".replace(",", "") + ", or draw its rows more than once with --again."
        )
        raise DataError(what, where=short, fix=fix)
    counts = {spec: int(wanted * share) for spec, share in shares.items()}
    by_remainder = sorted(shares, key=lambda spec: counts[spec] - wanted * shares[spec])
    for spec in by_remainder[: wanted - sum(counts.values())]:
        counts[spec] += 1
    for spec, count in counts.items():
        if not again:
            counts[spec] = min(count, sizes[spec])
        if not counts[spec]:
            what = f"A share of {shares[spec]:.1%} of {wanted:,} rows is not a single row."
            raise DataError(what, where=spec, fix="Raise its weight, or leave this data set out.")
    return counts


def _rows(spec: str) -> Iterator[tuple[Source, Row]]:
    return ((source, row) for source, row, _ in good_rows(spec, Changes()))
