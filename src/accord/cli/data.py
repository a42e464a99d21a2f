"""`accord data check` and `accord data show`: look at the data before a minute of training is spent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from accord.data.check import CheckReport
from accord.data.check import check as examine
from accord.data.load import load, read_records
from accord.data.problems import fail
from accord.data.usable import Kind, completions, prompt_of
from accord.errors import EmptyDataError
from accord.types import Content, LabelledCompletion, PreferencePair, Prompt, Ranking, Record

__all__ = ["check", "show"]

_COLOURS = {"error": "bold red", "warning": "yellow"}


def check(data: str, *, kind: Kind | None = None) -> int:
    """Examine a data set and report, with file:line, everything that would spoil training.

    Args:
        data: a file (.jsonl, .json, .csv, .parquet, also .gz), a directory or a hub id; NAME:SPLIT picks a split.
        kind: also report rows that cannot be used for this kind of training.

    Returns:
        1 if there are errors, else 0.
    """
    report = examine(data, kind)
    console = Console(highlight=False)
    console.print(_head(report))
    if report.findings:
        console.print(_findings(report))
    return 1 if report.has_errors else 0


def show(data: str, *, kind: Kind | None = None, rows: int = 3) -> None:
    """Print the first records as training would see them: prompt, completions, where they come from.

    Args:
        data: a file (.jsonl, .json, .csv, .parquet, also .gz), a directory or a hub id; NAME:SPLIT picks a split.
        kind: show the records as this kind of training uses them.
        rows: how many records to print.
    """
    console = Console(highlight=False)
    for record in _first(data, kind, rows):
        console.print(_panel(record))


def _first(data: str, kind: Kind | None, count: int) -> list[Record]:
    if kind is not None:
        return list(load(data, kind, limit=count).records)
    every: Iterator[Record] = (record for _, _, records in read_records(data, fail) for record in records)
    records = list(islice(every, count))
    if not records:
        raise EmptyDataError("There is no record to show.", where=data, fix="Ask for at least one row: --rows 1")
    return records


def _head(report: CheckReport) -> Text:
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(report.records.items()))
    lines = [f"{report.spec}: {report.rows:,} rows, {kinds or 'no record'}"]
    lines += [f"{name}: {value}" for name, value in report.figures.items()]
    text = Text("\n".join(lines))
    if not report.findings:
        text.append("\nNo problem found.", style="green")
    return text


def _findings(report: CheckReport) -> Table:
    table = Table("rule", "count", "finding", box=None, pad_edge=False)
    for finding in report.findings:
        more = "\n..." if finding.count > len(finding.places) > 0 else ""
        body = Text(_visible(finding.what))
        body.append("".join(f"\n{place}" for place in finding.places) + more, style="cyan")
        body.append(f"\n→ {_visible(finding.fix)}" if finding.fix else "")
        name = Text(f"{finding.severity} {finding.rule}", style=_COLOURS[finding.severity])
        table.add_row(name, f"{finding.count:,}", body)
    return table


def _panel(record: Record) -> Panel:
    parts = [_content("prompt", prompt_of(record), "bold blue")]
    for k, (name, content) in enumerate(completions(record).items()):
        note = f" (rank {record.ranks[k]})" if isinstance(record, Ranking) else ""
        parts.append(_content(name + note, content, "bold magenta"))
    if isinstance(record, LabelledCompletion):
        parts.append(Text(f"label: {'good' if record.label else 'bad'}"))
    if isinstance(record, PreferencePair) and record.margin is not None:
        parts.append(Text(f"margin: {record.margin:g}"))
    if isinstance(record, Prompt):
        parts += [Text(f"requires {r.kind}: {dict(r.options)}") for r in record.requirements]
        parts.append(Text(f"id: {_visible(record.id)}"))
    title = Text(f"{type(record).__name__}  {record.source}")
    return Panel(Group(*parts), title=title, title_align="left")


def _content(name: str, content: Content, style: str) -> Text:
    text = Text()
    if isinstance(content, str):
        text.append(f"{name} (plain)\n", style=style)
        return text.append(_visible(content))
    for k, turn in enumerate(content):
        text.append(f"{'' if k == 0 else chr(10)}{name}, {turn.role}\n", style=style)
        text.append(_visible(turn.content))
    return text


def _visible(text: str) -> str:
    """The text with control and direction characters spelled out: a terminal must not obey the data."""
    hidden = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
    return re.sub(hidden, lambda match: match.group().encode("unicode_escape").decode("ascii"), text)
