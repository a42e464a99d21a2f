"""Several data sets in given shares: rows drawn by seed, without replacement unless asked, and evenly interleaved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from accord.data.convert import good_rows
from accord.data.sources import Row
from accord.data.split import members, without_format
from accord.data.write import Changes, new_file
from accord.errors import ConfigError, DataError
from accord.types import Source

__all__ = ["Part", "mix"]


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
        ConfigError: a weight that is not positive, or `again` without `rows`.
        DataError: a data set is too small for its share, or part of `rows` rounds to none.
        RunError: the file exists.
    """
    if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
        raise ConfigError("Every weight must be positive.", where="--data", fix="Write e.g. --data a.jsonl=0.7")
    if again and rows is None:
        raise ConfigError("Drawing rows again has no end by itself.", where="--again", fix="Say how many: --rows 1000")
    for spec in weights:
        without_format(spec)
    generator = np.random.default_rng(seed)
    whole = Changes()
    with new_file(out, whole) as file:
        changes = {spec: Changes() for spec in weights}
        sizes = {spec: sum(1 for _ in good_rows(spec, changes[spec])) for spec in weights}
        drawn = _counts(weights, sizes, rows, again)
        for spec, each in changes.items():
            each.rows += sizes[spec]
            each.kept += sizes[spec]
            whole.extend(each)
        streams = [_drawn(spec, sizes[spec], drawn[spec], generator) for spec in weights]
        turns = np.repeat(np.arange(len(streams)), [drawn[spec] for spec in weights])
        for turn in generator.permutation(turns):
            source, row = next(streams[turn])
            for member in members(row):
                file.write(member, source)
    return {spec: Part(sizes[spec], drawn[spec], changes[spec]) for spec in weights}


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
            raise DataError(what, where=spec, fix="Ask for more --rows, or leave this data set out.")
    return counts


def _drawn(spec: str, size: int, count: int, generator: np.random.Generator) -> Iterator[tuple[Source, Row]]:
    """`count` of the rows, in the order of the file: every row count // size times, and a random choice once more."""
    passes, rest = divmod(count, size)
    once_more: NDArray[np.bool_] = np.zeros(size, bool)
    once_more[generator.choice(size, rest, replace=False)] = True
    whole = chain.from_iterable(_rows(spec) for _ in repeat(None, passes))
    return chain(whole, (item for item, taken in zip(_rows(spec), once_more, strict=True) if taken))


def _rows(spec: str) -> Iterator[tuple[Source, Row]]:
    return ((source, row) for source, row, _ in good_rows(spec, Changes()))
