"""Rules about the length of completions: were the long ones cut off?"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from accord.data.check.report import CheckReport, Histogram
from accord.data.check.rules import ENOUGH, Item, Places, Rule, best_and_worst
from accord.data.problems import Problem
from accord.data.usable import completions, prompt_of
from accord.stats.intervals import wilson
from accord.types import Content, LabelledCompletion, Ranking, Record

__all__ = ["Lengths"]

_BINS = 28
_LONG = 0.05
"""The share of completions that counts as the longest ones."""
_PILE = 10
_PILE_SHARE = 0.005
_LEAST_WORDS = 20
_LISTED = 5


class Lengths(Rule):
    """Keeps length, end and place of every completion. C = completions."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.lengths: dict[str, array[int]] = {}
        self.characters, self.words = array("I"), array("I")
        self.numbers, self.open = array("Q"), bytearray()

    def see(self, item: Item) -> Iterator[Problem]:
        number = self.places.number(item.source)
        for record in item.sound:
            for name, content in _named(record).items():
                self.lengths.setdefault(name, array("I")).append(len(_last_text(content)))
            for content in completions(record).values():
                text = _last_text(content).rstrip()
                self.characters.append(len(text))
                self.words.append(text.count(" ") + 1)
                self.open.append(text[-1].isalnum() or text[-1] in ",-–—(")
                self.numbers.append(number)
        return iter(())

    def end(self, report: CheckReport) -> None:
        self._histograms(report)
        if len(self.numbers) >= ENOUGH:
            self._cap(report)
            self._unfinished(report)

    def _histograms(self, report: CheckReport) -> None:
        if not self.lengths:
            return
        values = {name: np.frombuffer(lengths, np.uint32) for name, lengths in self.lengths.items()}
        top = max(float(lengths.max()) for lengths in values.values())
        # Lengths spread over decades: bins of equal ratio, from 1 character to the longest text.
        edges = [0.0, *np.geomspace(1, max(top, 2) + 1, _BINS).tolist()]
        report.lengths = {name: Histogram.of(lengths, edges) for name, lengths in values.items()}
        middle = [f"{name} {report.lengths[name].median:,.0f}" for name in report.lengths]
        report.figures["median length"] = ", ".join(middle) + " characters"

    def _cap(self, report: CheckReport) -> None:
        """Many completions have exactly the greatest length, and most of those end in mid-sentence."""
        open_C = np.frombuffer(self.open, np.bool_)
        words_C = np.frombuffer(self.words, np.uint32)
        for unit, length_C in (("characters", np.frombuffer(self.characters, np.uint32)), ("words", words_C)):
            longest = np.flatnonzero(length_C == length_C.max())
            enough = len(longest) >= max(_PILE, _PILE_SHARE * len(length_C))
            if enough and words_C.max() >= _LEAST_WORDS and open_C[longest].mean() >= 0.5:
                what = f"{len(longest):,} completions have exactly {length_C.max():,} {unit}, the greatest length."
                fix = "They were cut off there: get the whole texts, or remove these rows."
                report.add("length-cap", what, fix, len(longest), self._problems("length-cap", what, longest))
                return

    def _unfinished(self, report: CheckReport) -> None:
        """The longest completions end in mid-sentence clearly more often than the others."""
        open_C, length_C = np.frombuffer(self.open, np.bool_), np.frombuffer(self.characters, np.uint32)
        report.figures["completions without a last full stop"] = f"{open_C.mean():.0%} of {len(open_C):,}"
        limit = np.quantile(length_C, 1 - _LONG)
        long_C = length_C >= limit
        long, rest = int(long_C.sum()), int((~long_C).sum())
        if long < 20 or not rest:
            return
        cut, others = int(open_C[long_C].sum()), int(open_C[~long_C].sum())
        if cut / long > max(0.2, 2 * others / rest) and wilson(cut, long).low > wilson(others, rest).high:
            what = (
                f"{cut / long:.0%} of the longest {long:,} completions (from {limit:,.0f} characters) end in"
                f" mid-sentence, of the others {others / rest:.0%}."
            )
            places = np.flatnonzero(long_C & open_C)
            fix = "They look cut off: a model trained on them learns to stop anywhere."
            report.add("unfinished", what, fix, cut, self._problems("unfinished", what, places))

    def _problems(self, rule: str, what: str, places: np.typing.NDArray[np.intp]) -> list[Problem]:
        return [Problem(rule, self.places[self.numbers[k]], what) for k in places[:_LISTED]]


def _named(record: Record) -> dict[str, Content]:
    """What the histograms tell apart; a ranking gives its best and its worst completion."""
    if isinstance(record, Ranking):
        sides: dict[str, Content] = dict(zip(("chosen", "rejected"), best_and_worst(record), strict=True))
    elif isinstance(record, LabelledCompletion):
        sides = {"good" if record.label else "bad": record.completion}
    else:
        sides = completions(record)
    return {"prompt": prompt_of(record), **sides}


def _last_text(content: Content) -> str:
    """The text, or that of the last message."""
    return content if isinstance(content, str) else content[-1].content if content else ""
