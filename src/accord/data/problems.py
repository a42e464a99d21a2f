"""What can be wrong with a row: a rule's name, the place, the sentence and the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accord.errors import RowError
from accord.types import Source

__all__ = ["OnProblem", "Problem", "fail"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One row that cannot be used, and why.

    Example: ``Problem("empty", Source("pairs.jsonl", 3), "The completion is empty.", "Remove the row.")``
    """

    rule: str
    source: Source
    what: str
    fix: str | None = None

    @property
    def stops(self) -> bool:
        """Whether training must not go on; what a format leaves out on purpose is only counted."""
        return self.rule != "left-out"

    @property
    def error(self) -> RowError:
        """The problem as the exception that a caller raises."""
        return RowError(self.what, where=str(self.source), fix=self.fix)


OnProblem = Callable[[Problem], None]
"""Called for every bad row. It raises to stop, or notes the problem and returns to go on with the next row."""


def fail(problem: Problem) -> None:
    """Raise the problem: the strictest `OnProblem`."""
    raise problem.error
