"""`accord data check`: the data doctor, before a minute of training is spent."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from accord.cli.data import visible
from accord.data.check import CheckReport
from accord.data.check import check as examine
from accord.data.check.repair import Repaired
from accord.data.usable import Kind
from accord.errors import ConfigError
from accord.files import write_text
from accord.tracking import Progress

__all__ = ["check"]

_COLOURS = {"error": "bold red", "warning": "yellow"}
_PATIENCE_S = 3.0
"""A check that takes longer shows its progress."""
_ROWS_PER_TICK = 200


def check(
    data: str,
    *,
    kind: Kind | None = None,
    against: tuple[str, ...] = (),
    fix: Path | None = None,
    html: Path | None = None,
) -> int:
    """Examine a data set and report, with file:line, everything that would spoil training.

    Args:
        data: a file (.jsonl, .json, .csv, .parquet, also .gz), a directory or a hub id; NAME:SPLIT picks a split.
        kind: also report rows that cannot be used for this kind of training.
        against: a test set or benchmark that may not share a prompt with the data; repeat for more.
        fix: write the rows that can be used to this new .jsonl file, and what became of the others to FIX.changes.
        html: write a page to look at: findings with examples, lengths, labels.

    Returns:
        1 if there are errors, else 0.
    """
    if html is not None and html.suffix not in (".html", ".htm"):
        raise ConfigError("The page is written as HTML.", where=str(html), fix="Name it something.html")
    with _Rows() as rows:
        report = examine(data, kind, against=against, fix=fix, on_row=rows.count)
    console = Console(highlight=False)
    console.print(_head(report))
    if report.findings:
        console.print(_findings(report))
    if report.repaired is not None:
        console.print(_repaired(report.repaired))
    if html is not None:
        from accord.cli.check_page import render_html

        write_text(html, render_html(report))
        console.print(f"page: {html}", soft_wrap=True)
    return 1 if report.has_errors else 0


class _Rows(ExitStack):
    """Counts rows on standard error, once it takes long."""

    def __init__(self) -> None:
        super().__init__()
        self._start, self._seen, self._told = time.monotonic(), 0, 0
        self._progress: Progress | None = None

    def count(self) -> None:
        self._seen += 1
        if self._seen - self._told < _ROWS_PER_TICK:
            return
        if self._progress is None and time.monotonic() - self._start > _PATIENCE_S:
            self._progress = self.enter_context(Progress("check", total=None, unit="rows", done=self._seen))
            self._told = self._seen
        if self._progress is not None:
            self._progress.advance(self._seen - self._told, work=self._seen - self._told)
            self._told = self._seen


def _head(report: CheckReport) -> Text:
    text = Text("\n".join([report.summary, *(f"{name}: {value}" for name, value in report.figures.items())]))
    if not report.findings:
        text.append("\nNo problem found.", style="green")
    return text


def _findings(report: CheckReport) -> Table:
    table = Table("rule", "count", "finding", box=None, pad_edge=False)
    for finding in report.findings:
        more = "\n..." if finding.count > len(finding.examples) > 0 else ""
        body = Text(visible(finding.what))
        body.append("".join(f"\n{place}" for place in finding.places) + more, style="cyan")
        body.append(f"\n→ {visible(finding.fix)}" if finding.fix else "")
        name = Text(f"{finding.severity} {finding.rule}", style=_COLOURS[finding.severity])
        table.add_row(name, f"{finding.count:,}", body)
    return table


def _repaired(done: Repaired) -> Text:
    changed = f" ({done.changed:,} changed)" if done.changed else ""
    counts = f"{done.kept:,} rows kept{changed}, {done.dropped:,} dropped"
    return Text(f"{done.path}: {counts}; {done.changes} says which and why", style="green")
