"""Rules for thumbs up and down: their balance, and whether equal labels stand together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

import numpy as np
from scipy.special import ndtr

from accord.data.check.report import CheckReport
from accord.data.check.rules import ENOUGH, Item, Places, Rule
from accord.data.problems import Problem
from accord.types import LabelledCompletion

__all__ = ["Labels", "runs_test"]

_BALANCE_LIMIT = 0.9
_RUNS_LEVEL = 1e-3
_STRETCHES = 80


class Labels(Rule):
    """Keeps one byte per label, and the places where runs begin."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.labels = bytearray()
        self.longest = (0, 0)
        """The longest run: its length and the place where it begins."""
        self._run = (0, 0)

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.sound:
            if isinstance(record, LabelledCompletion):
                goes_on = bool(self.labels) and self.labels[-1] == record.label
                length, start = self._run
                self._run = (length + 1, start) if goes_on else (1, self.places.number(item.source))
                self.longest = max(self.longest, self._run, key=lambda run: run[0])
                self.labels.append(record.label)
        return iter(())

    def end(self, report: CheckReport) -> None:
        total = len(self.labels)
        if not total:
            return
        true = sum(self.labels)
        rate = true / total
        report.figures["labels true"] = f"{rate:.0%} of {total:,}"
        labels = np.frombuffer(self.labels, np.uint8)
        report.labels = [float(part.mean()) for part in np.array_split(labels, min(total, _STRETCHES))]
        if total >= ENOUGH and not 1 - _BALANCE_LIMIT <= rate <= _BALANCE_LIMIT:
            what = f"{rate:.0%} of {total:,} labels are true."
            report.add("label-balance", what, "Weight the rarer label, or collect more of it.", max(true, total - true))
        self._runs(report, true, total - true)

    def _runs(self, report: CheckReport, true: int, false: int) -> None:
        if not true or not false:
            return
        runs = sum(1 for _ in groupby(self.labels))
        expected, p = runs_test(runs, true, false)
        length, start = self.longest
        report.figures["label runs"] = f"{runs:,}, by chance {expected:,.0f}; the longest has {length:,} labels"
        if true + false >= ENOUGH and p < _RUNS_LEVEL:
            what = (
                f"The labels come in {runs:,} runs, by chance there would be {expected:,.0f}; one run has {length:,}."
            )
            fix = "Shuffle the rows, and ask why equal labels were collected together."
            report.add("label-runs", what, fix, runs, [Problem("label-runs", self.places[start], what)])


def runs_test(runs: int, true: int, false: int) -> tuple[float, float]:
    """How many runs chance gives, and the probability of so few (Wald and Wolfowitz 1940, normal approximation)."""
    n, product = true + false, 2 * true * false
    expected = 1 + product / n
    variance = product * (product - n) / (n * n * (n - 1))
    return expected, float(ndtr((runs - expected) / math.sqrt(variance))) if variance > 0 else 1.0
