"""What the data doctor found: findings with places, and the figures of the data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from accord.data.problems import Problem
from accord.types import Source

if TYPE_CHECKING:
    from accord.data.check.repair import Repaired

__all__ = ["CheckReport", "Finding", "Histogram", "Severity"]

Severity = Literal["error", "warning"]

_LISTED = 5


@dataclass(slots=True)
class Finding:
    """What one rule found: how often, the first few problems with their places, and the way out.

    Example: ``Finding("empty", "error", "The prompt is empty.", "Write it.", count=1, examples=[Problem(...)])``
    """

    rule: str
    severity: Severity
    what: str
    fix: str | None = None
    count: int = 0
    examples: list[Problem] = field(default_factory=list)

    @property
    def places(self) -> list[Source]:
        """Where the examples stand."""
        return [problem.source for problem in self.examples]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        places = f" ({', '.join(map(str, self.places))}{more})" if self.examples else ""
        return f"{self.severity}  {self.rule}  {self.count:,}×  {self.what}{places}"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Lengths in characters: how many texts fall between one edge and the next, and the middle of all.

    Example: ``Histogram(edges=(0, 10, 20), counts=(3, 1), median=8.0)``
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    median: float

    @classmethod
    def of(cls, values: NDArray[np.uint32], edges: Sequence[float]) -> Histogram:
        """Count the values."""
        counts, _ = np.histogram(values, edges)
        return cls(tuple(edges), tuple(int(count) for count in counts), float(np.median(values)))


@dataclass(slots=True)
class CheckReport:
    """The findings, errors first, and the figures of a data set. `str(report)` is the whole report as text.

    Attributes:
        lengths: of prompts and completions, by name, all on the same edges.
        labels: share of true labels in consecutive stretches of the rows.
        repaired: what `--fix` did.
    """

    spec: str
    rows: int = 0
    records: Counter[str] = field(default_factory=Counter)
    figures: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    lengths: dict[str, Histogram] = field(default_factory=dict)
    labels: list[float] = field(default_factory=list)
    repaired: Repaired | None = None

    @property
    def has_errors(self) -> bool:
        """Whether anything was found that stops training."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def summary(self) -> str:
        """One line: ``a.jsonl: 1,000 rows, 1,000 PreferencePair``."""
        kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(self.records.items()))
        return f"{self.spec}: {self.rows:,} rows, {kinds or 'no record'}"

    def note(self, severity: Severity, problem: Problem) -> None:
        """Count one more problem of its rule; the first few are kept as examples."""
        finding = next((known for known in self.findings if known.rule == problem.rule), None)
        if finding is None:
            finding = Finding(problem.rule, severity, problem.what, problem.fix)
            self.findings.append(finding)
        finding.count += 1
        if len(finding.examples) < _LISTED:
            finding.examples.append(problem)

    def add(self, rule: str, what: str, fix: str, count: int, examples: Sequence[Problem] = ()) -> None:
        """Add a warning about the data set as a whole."""
        self.findings.append(Finding(rule, "warning", what, fix, count, list(examples[:_LISTED])))

    def __str__(self) -> str:
        lines = [self.summary, *(f"{name}: {value}" for name, value in self.figures.items())]
        return "\n".join(lines + ([str(finding) for finding in self.findings] or ["No problem found."]))
