"""The data doctor's page: one HTML file with its own style sheet and inline SVG; no script, nothing from the network.

Texts of data are hostile until proven otherwise: everything is escaped, and the page forbids scripts itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from accord.cli.data import visible
from accord.data.check import CheckReport, Finding
from accord.data.check.rules import contents
from accord.data.formats import split_format
from accord.data.load import read_records
from accord.data.problems import Problem
from accord.data.sources import data_files
from accord.errors import RowError
from accord.types import Content, Record, Source

__all__ = ["render_html"]

_MOST_CHARACTERS = 2000
_WIDTH, _HEIGHT = 280.0, 90.0
_COLOURS = {
    "prompt": "var(--before)",
    "completion": "var(--good)",
    **dict.fromkeys(["chosen", "good"], "var(--after)"),
    **dict.fromkeys(["rejected", "bad"], "var(--open)"),
}


class Bars(NamedTuple):
    """A histogram as an outline: the name of what is counted, its colour, the points of the line, and a note."""

    name: str
    colour: str
    points: str
    note: str


def render_html(report: CheckReport) -> str:
    """The whole page. Reads the data again, up to the last row that is shown."""
    environment = Environment(
        loader=PackageLoader("accord.cli", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["visible"] = visible
    wanted = {place for finding in report.findings for place in finding.places}
    texts = _texts(report.spec, wanted)
    return environment.get_template("check_page.html.jinja").render(
        report=report,
        style=Markup(files("accord.evaluate.report").joinpath("page.css").read_text(encoding="utf-8")),
        tiles=_tiles(report),
        findings=[(finding, _examples(finding, texts)) for finding in report.findings],
        lengths=_lengths(report),
        ticks=_ticks(report),
        width=_WIDTH,
        height=_HEIGHT,
    )


def _texts(spec: str, wanted: set[Source]) -> dict[Source, list[tuple[str, str]]]:
    """What stands in the rows: (name, text) of prompt and completions; rows that cannot be read are left out."""
    found: dict[Source, list[tuple[str, str]]] = {}
    of_data = {place for place in wanted if _is_row(spec, place)}
    if not of_data:
        return found
    try:
        for source, _, records in read_records(spec, _ignore):
            if source in of_data:
                found[source] = [part for record in records for part in _parts(record)]
                if len(found) == len(of_data):
                    break
    except RowError:
        # The file breaks off: the report has it as a finding, and the page shows what comes before.
        return found
    return found


def _is_row(spec: str, place: Source) -> bool:
    """Whether the place is a row of the data, and not a line of its licence."""
    paths = data_files(split_format(spec)[0])
    return paths is None or place.path in map(str, paths)


def _ignore(_: Problem) -> None:
    """Rows that cannot be read are findings already."""


def _parts(record: Record) -> Iterable[tuple[str, str]]:
    for name, content in contents(record).items():
        text = _flat(content)
        more = f"\n[{len(text) - _MOST_CHARACTERS:,} more characters]" if len(text) > _MOST_CHARACTERS else ""
        yield name, text[:_MOST_CHARACTERS] + more


def _flat(content: Content) -> str:
    return content if isinstance(content, str) else "\n\n".join(f"{turn.role}: {turn.content}" for turn in content)


def _examples(
    finding: Finding, texts: dict[Source, list[tuple[str, str]]]
) -> list[tuple[Problem, list[tuple[str, str]]]]:
    return [(problem, texts.get(problem.source, [])) for problem in finding.examples]


def _tiles(report: CheckReport) -> list[tuple[str, str, str]]:
    """(style, label, value) of the figures in large print."""
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = len(report.findings) - errors
    tiles = [
        ("", "Rows", f"{report.rows:,}"),
        *(("", name, f"{count:,}") for name, count in sorted(report.records.items())),
        ("worse" if errors else "better", "Errors", f"{errors} {'kind' if errors == 1 else 'kinds'}"),
        ("open" if warnings else "better", "Warnings", f"{warnings} {'kind' if warnings == 1 else 'kinds'}"),
    ]
    if report.repaired is not None:
        tiles.append(("better", "Kept by --fix", f"{report.repaired.kept:,}"))
    return tiles


def _lengths(report: CheckReport) -> list[Bars]:
    """One outline for each kind of text, on the same bins; heights are shares, so that few and many compare."""
    bars = []
    for name, histogram in report.lengths.items():
        total = sum(histogram.counts)
        highest = max(max(other.counts) / sum(other.counts) for other in report.lengths.values())
        step = _WIDTH / len(histogram.counts)
        points = [f"0,{_HEIGHT:.0f}"]
        for j, count in enumerate(histogram.counts):
            top = _HEIGHT * (1 - count / total / highest)
            points += [f"{j * step:.1f},{top:.1f}", f"{(j + 1) * step:.1f},{top:.1f}"]
        points.append(f"{_WIDTH:.0f},{_HEIGHT:.0f}")
        note = f"{total:,} texts, median {histogram.median:,.0f} characters"
        bars.append(Bars(name, _COLOURS[name], " ".join(points), note))
    return bars


def _ticks(report: CheckReport) -> list[tuple[float, str]]:
    """(x, label) at the powers of ten within the edges."""
    if not report.lengths:
        return []
    edges = next(iter(report.lengths.values())).edges
    ticks = []
    for value in (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000):
        bin_ = next((j for j, edge in enumerate(edges) if edge >= value), None)
        if bin_ is not None:
            ticks.append((bin_ * _WIDTH / (len(edges) - 1), f"{value:,}"))
    return ticks
