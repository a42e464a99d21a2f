"""`accord data check` and `accord data show`: look at the data before a minute of training is spent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from accord.data.check import CheckReport
from accord.data.check import check as examine
from accord.data.load import load, read_records
from accord.data.problems import fail
from accord.data.usable import Kind, completions, prompt_of
from accord.errors import ConfigError, EmptyDataError
from accord.types import Content, Demonstration, LabelledCompletion, PreferencePair, Prompt, Ranking, Record

if TYPE_CHECKING:
    from accord.models.render import Renderer
    from accord.models.trees import Branch

__all__ = ["check", "show"]

_COLOURS = {"error": "bold red", "warning": "yellow"}
_PROMPT_STYLE, _COMPLETION_STYLE = "bold blue", "bold magenta"
_PROMPT_TAIL = 40
"""Tokens of the prompt that are printed: what matters is where it ends."""


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


def show(
    data: str,
    *,
    model: str | None = None,
    kind: Kind | None = None,
    rows: int = 3,
    max_tokens: int | None = None,
) -> None:
    """Print the first records as training would see them; with a model, token by token.

    Without a model: prompt, completions, and where they come from. With one: where the prompt ends, which tokens carry
    loss (in ⟦brackets⟧), what was cut, and whether the stop token is trained.

    Args:
        data: a file (.jsonl, .json, .csv, .parquet, also .gz), a directory or a hub id; NAME:SPLIT picks a split.
        model: a hub id, a directory or `starter`: print the tokens of this model.
        kind: show the records as this kind of training uses them.
        rows: how many records to print.
        max_tokens: cut as training with this limit would; the model's context if not given.
    """
    if max_tokens is not None and model is None:
        fix = "Add --model, e.g. --model starter"
        raise ConfigError("--max-tokens has no effect without a model.", where="--max-tokens", fix=fix)
    records = _first(data, kind, rows)
    console = Console(highlight=False)
    if model is None:
        for record in records:
            console.print(_panel(record, _texts(record)))
        return
    from accord.models.load import load_policy
    from accord.models.render import Renderer

    renderer = Renderer(load_policy(model), max_tokens)
    for record in records:
        console.print(_panel(record, _tokens(record, renderer)))


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


def _panel(record: Record, parts: list[Text]) -> Panel:
    title = Text(f"{type(record).__name__}  {record.source}")
    return Panel(Group(*parts), title=title, title_align="left")


def _texts(record: Record) -> list[Text]:
    parts = [_content("prompt", prompt_of(record), _PROMPT_STYLE)]
    for k, (name, content) in enumerate(completions(record).items()):
        note = f" (rank {record.ranks[k]})" if isinstance(record, Ranking) else ""
        parts.append(_content(name + note, content, _COMPLETION_STYLE))
    if isinstance(record, LabelledCompletion):
        parts.append(Text(f"label: {'good' if record.label else 'bad'}"))
    if isinstance(record, PreferencePair) and record.margin is not None:
        parts.append(Text(f"margin: {record.margin:g}"))
    if isinstance(record, Prompt):
        parts += [Text(f"requires {r.kind}: {dict(r.options)}") for r in record.requirements]
        parts.append(Text(f"id: {_visible(record.id)}"))
    return parts


def _tokens(record: Record, renderer: Renderer) -> list[Text]:
    """The record's tokens as training sees them: the end of the prompt, then every completion whole."""
    branches: tuple[Branch, ...] = ()
    if isinstance(record, Prompt):
        prompt = renderer.prompt(record.content, record.source)
    else:
        if isinstance(record, LabelledCompletion):
            record = Demonstration(record.prompt, record.completion, record.source)
        tree = renderer.tree(record)
        prompt, branches = tree.prompt_P, tree.branches
    tail = prompt[-_PROMPT_TAIL:]
    head = Text(f"prompt: {len(prompt)} tokens" + (f", the last {_PROMPT_TAIL}" if len(prompt) > len(tail) else ""))
    head.stylize(_PROMPT_STYLE)
    parts = [head, _pieces(tail, [False] * len(tail), renderer)]
    for name, branch in zip(completions(record), branches, strict=True):
        trained = bool(branch.loss_mask_L[-1]) and branch.tokens_L[-1] in renderer.stop_ids
        facts = [
            f"{name}: {len(branch.tokens_L)} tokens",
            f"{int(branch.loss_mask_L.sum())} with loss",
            f"stop token {'trained' if trained else 'NOT trained'}",
            *([f"CUT at {renderer.max_tokens} tokens"] if branch.truncated else []),
        ]
        parts += [Text(", ".join(facts), _COMPLETION_STYLE), _pieces(branch.tokens_L, branch.loss_mask_L, renderer)]
    return parts


def _pieces(tokens: Iterable[int], losses: Iterable[bool], renderer: Renderer) -> Text:
    """Tokens parted by `|`; each run of tokens that carry loss stands in ⟦brackets⟧."""
    text = Text()
    for has_loss, run in groupby(zip(tokens, losses, strict=True), key=lambda pair: bool(pair[1])):
        line = "|".join(_piece(int(token), renderer) for token, _ in run)
        text.append(f"⟦{line}⟧" if has_loss else line, style="green" if has_loss else "dim")
    return text


def _piece(token: int, renderer: Renderer) -> str:
    piece: str = renderer.tokenizer.decode([token])
    return f"<{token}>" if "\ufffd" in piece else _visible(piece).replace("\n", "⏎")


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
