"""One pass over a data set: read every row, show it to every rule, and repair what can be repaired."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from accord.data.check.contents import Alternation, Flaws, Margin, PersonalData, TemplateTokens, Truncated
from accord.data.check.labels import Labels
from accord.data.check.languages import Languages
from accord.data.check.lengths import Lengths
from accord.data.check.licence import restrictions
from accord.data.check.preferences import Contradictions, LongerWins
from accord.data.check.repair import Repair, mend_surrogates, repairing
from accord.data.check.repeats import Overlap, Prompts, Repeated
from accord.data.check.report import CheckReport
from accord.data.check.rules import RULES, Item, Places, Rule
from accord.data.formats import read_row, read_units, split_format
from accord.data.formats.base import row_id
from accord.data.load import require_kind
from accord.data.problems import Problem
from accord.data.sources import Row, read_rows
from accord.data.usable import Kind, unusable, usable
from accord.errors import RowError
from accord.types import Record, Source

__all__ = ["check"]


def check(
    spec: str,
    kind: Kind | None = None,
    *,
    against: Sequence[str] = (),
    fix: Path | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> CheckReport:
    """Examine every row of a file, directory or hub data set; never stops at a bad row.

    Args:
        spec: what to read (`accord.data.sources.read_rows`).
        kind: also report rows that cannot be used for this kind of training.
        against: data sets that may not share a prompt with this one: test sets, benchmarks.
        fix: write the rows that can be used to this new file, and what became of the others to ``fix + ".changes"``.
        on_row: called after every row, of the other data sets, too.

    Raises:
        MissingDataError, EmptyDataError, DataError: nothing to read; with `fix`, no row left.
        ConfigError: `fix` exists.
        RowError: with `fix`, a file that cannot be read to its end.
    """
    if kind is not None:
        require_kind(kind)
    place, name = split_format(spec)
    with nullcontext() if fix is None else repairing(fix, place, name) as repair:
        doctor = _Doctor(spec, kind, against, repair, on_row)
        try:
            for source, row, records in read_units(
                doctor.count(read_rows(place, doctor.unreadable)), name, doctor.unfit
            ):
                doctor.examine(source, row, records)
        except RowError as error:
            if repair is not None:
                raise
            path, _, line = (error.where or spec).rpartition(":")
            doctor.note(Problem("damaged", Source(path, int(line)), error.what, error.fix))
        return doctor.report()


class _Doctor:
    def __init__(
        self, spec: str, kind: Kind | None, against: Sequence[str], repair: Repair | None, on_row: Callable[[], None]
    ) -> None:
        self.place, self.name = split_format(spec)
        self.kind, self.repair, self.on_row = kind, repair, on_row
        self.result = CheckReport(spec)
        places = Places()
        self.rules: list[Rule] = [
            Flaws(),  # first: it decides which records are sound
            TemplateTokens(),
            Alternation(),
            Truncated(),
            Margin(),
            PersonalData(),
            Repeated(places),
            Prompts(places),
            Contradictions(places),
            LongerWins(),
            Lengths(places),
            Labels(places),
            Languages(),
        ]
        if against:
            self.rules.append(Overlap(places, against, on_row))

    def note(self, problem: Problem) -> None:
        self.result.note(RULES[problem.rule].severity, problem)

    def count(self, rows: Iterator[tuple[Source, Row]]) -> Iterator[tuple[Source, Row]]:
        """Count the rows on their way to the formats, and remember the last one."""
        for self.last in rows:
            self._tick()
            yield self.last

    def unreadable(self, problem: Problem) -> None:
        """A line that is no row."""
        self._tick()
        self._settle(problem.source, None, [problem])

    def unfit(self, problem: Problem) -> None:
        """A row that no format can read, or a part that its format leaves out."""
        if problem.rule == "left-out":
            self.note(problem)
            return
        source, row = self.last
        mended = mend_surrogates(row)
        if source == problem.source and mended != row:
            try:
                records = read_row(mended, source, self.name, self.unfit)
            except RowError:
                pass
            else:
                self.examine(source, row, records, Problem("surrogate", source, problem.what, problem.fix))
                return
        self._settle(problem.source, None, [problem])

    def examine(self, source: Source, row: Row, records: list[Record], *problems: Problem) -> None:
        """Show the records of one row to every rule; `problems`: what is known to be wrong with it."""
        found = list(problems)
        self.result.records.update(type(record).__name__ for record in records)
        if self.kind is not None:
            selected = usable(records, self.kind, row_id(row, source))
            if records and not selected:
                found.append(unusable(records[0], self.kind).at(source))
            records = selected
        item = Item(source, row, records, [])
        for rule in self.rules:
            found += rule.see(item)
        self._settle(source, row, found)

    def report(self) -> CheckReport:
        for rule in self.rules:
            rule.end(self.result)
        for problem in restrictions(self.place):
            self.note(problem)
        order = list(RULES)
        self.result.findings.sort(key=lambda finding: order.index(finding.rule))
        if self.repair is not None:
            self.repair.done.dropped = self.result.rows - self.repair.done.kept
            self.result.repaired = self.repair.done
        return self.result

    def _tick(self) -> None:
        self.result.rows += 1
        self.on_row()

    def _settle(self, source: Source, row: Row | None, problems: list[Problem]) -> None:
        for problem in problems:
            self.note(problem)
        if self.repair is not None:
            self.repair.settle(source, row, problems)
