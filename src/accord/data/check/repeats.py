"""Rules about what occurs twice: records, ids, prompts that are almost alike, and prompts of other data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from accord.data.check.report import CheckReport
from accord.data.check.rules import Item, Places, Rule, contents, digest
from accord.data.formats import read_row, split_format
from accord.data.minhash import NearDuplicates
from accord.data.problems import Problem
from accord.data.sources import Row, read_rows
from accord.data.usable import prompt_of, said
from accord.errors import EmptyDataError, RowError
from accord.types import Content, Prompt, Source

__all__ = ["Overlap", "Prompts", "Repeated"]

_LEAST_WORDS = 4
"""A cell of fewer words is a name or a label, not a text that could leak."""


class Repeated(Rule):
    """The same record twice, or two prompts with one id."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.seen: dict[int, int] = {}
        self.ids: dict[int, int] = {}

    def see(self, item: Item) -> Iterator[Problem]:
        number = self.places.number(item.source)
        for record in item.records:
            if isinstance(record, Prompt):
                first = self.ids.setdefault(digest(record.id), number)
                if first != number:
                    what = f"Also the id of {self.places[first]}: {record.id!r}."
                    yield Problem("duplicate-id", item.source, what, "Number the prompts.")
            whole = repr((type(record).__name__, contents(record), said(record)))
            first = self.seen.setdefault(digest(whole), number)
            if first != number:
                what = f"The same record as {self.places[first]}."
                yield Problem("duplicate", item.source, what, "Remove one, or keep it as a weight.")


class Prompts(Rule):
    """Prompts that are almost, but not exactly, an earlier one; exactly equal ones have several completions."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.seen: set[int] = set()
        self.near: NearDuplicates[int] = NearDuplicates()

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.sound[:1]:
            text = _plain(prompt_of(record))
            key = digest(text)
            if key in self.seen:
                continue
            self.seen.add(key)
            earlier = self.near.add(text, self.places.number(item.source))
            if earlier is not None:
                what = f"The prompt is almost that of {self.places[earlier]}."
                fix = "`accord data dedup` keeps one of each; for a split, keep both on the same side."
                yield Problem("near-duplicate", item.source, what, fix)

    def end(self, report: CheckReport) -> None:
        if self.seen:
            report.figures["distinct prompts"] = f"{len(self.seen):,}"
        _tell_forgotten(self.near, report, "prompts")


class Overlap(Rule):
    """Prompts that other data sets have, too: test sets and benchmarks, whose scores would mean nothing afterwards."""

    def __init__(self, places: Places, against: Sequence[str], on_row: Callable[[], None]) -> None:
        """Read the other data sets; a row of unknown columns counts with every text in it.

        Raises:
            MissingDataError, EmptyDataError, DataError: one of them cannot be read.
        """
        self.places = places
        self.texts: dict[int, int] = {}
        self.near: NearDuplicates[int] = NearDuplicates()
        self.found: dict[int, int] = {}
        """Near-overlaps by prompt: the rows of a prompt are told the same."""
        self.clear: set[int] = set()
        self.counts = {spec: self._read(spec, on_row) for spec in against}

    def _read(self, spec: str, on_row: Callable[[], None]) -> int:
        count = 0
        place, name = split_format(spec)
        for source, row in read_rows(place):
            for text in map(_plain, _prompts(row, source, name)):
                count += 1
                number = self.places.number(source)
                if self.texts.setdefault(digest(text), number) == number:
                    self.near.add(text, number)
            on_row()
        if not count:
            raise EmptyDataError("There is no prompt to compare with.", where=spec, fix="Name a data set with texts.")
        return count

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.records[:1]:
            text = _plain(prompt_of(record))
            key = digest(text)
            if key in self.texts:
                what = f"The prompt stands in {self.places[self.texts[key]]}, too."
                yield Problem("overlap", item.source, what, "Remove the row from the training data.")
                continue
            if key not in self.clear and key not in self.found:
                place = self.near.find(text)
                if place is None:
                    self.clear.add(key)
                else:
                    self.found[key] = place
            if key in self.found:
                what = f"The prompt is almost one of {self.places[self.found[key]]}."
                yield Problem("near-overlap", item.source, what, "Remove the row from the training data.")

    def end(self, report: CheckReport) -> None:
        for spec, count in self.counts.items():
            report.figures[f"compared with {spec}"] = f"{count:,} texts"
        _tell_forgotten(self.near, report, "texts of --against")


def _tell_forgotten(near: NearDuplicates[int], report: CheckReport, noun: str) -> None:
    if near.forgotten:
        report.figures[f"{noun} not compared for near repetition"] = f"the first {near.forgotten:,}"


def _prompts(row: Row, source: Source, name: str | None) -> list[Content]:
    try:
        return [prompt_of(record) for record in read_row(row, source, name, lambda _: None)[:1]]
    except RowError:
        return [text for text in _strings(row) if len(text.split()) >= _LEAST_WORDS]


def _strings(value: object) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _plain(prompt: Content) -> str:
    """What is asked, whatever form it has: the turns' words in lower case, without roles and system message."""
    text = prompt if isinstance(prompt, str) else " ".join(turn.content for turn in prompt if turn.role != "system")
    return " ".join(text.casefold().split())
