"""`accord data show`: the records, and the tokens that training makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from accord.data.load import load, read_records
from accord.data.problems import Problem
from accord.data.usable import Kind, completions, prompt_of
from accord.errors import ConfigError, EmptyDataError
from accord.types import (
    Content,
    Demonstration,
    LabelledCompletion,
    PreferencePair,
    Prompt,
    Ranking,
    RatedCompletion,
    Record,
)

if TYPE_CHECKING:
    from accord.models.render import Renderer
    from accord.models.trees import Branch

__all__ = ["show", "visible"]

_PROMPT_STYLE, _COMPLETION_STYLE = "bold blue", "bold magenta"
_PROMPT_TAIL = 40
"""Tokens of the prompt that are printed: what matters is where it ends."""


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
        rows: how many records to print, at least 1.
        max_tokens: cut as training with this limit would; the model's context if not given.
    """
    if rows < 1:
        raise ConfigError(f"--rows {rows} shows nothing.", where="--rows", fix="Ask for at least one: --rows 1")
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
    every: Iterator[Record] = (record for _, _, records in read_records(data, _tell) for record in records)
    records = list(islice(every, count))
    if not records:
        raise EmptyDataError("There is no record to show.", where=data, fix="Every row was left out, as said above.")
    return records


def _tell(problem: Problem) -> None:
    if problem.stops:
        raise problem.error
    Console(stderr=True, highlight=False).print(Text(f"Left out: {problem.source}: {visible(problem.what)}", "yellow"))


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
    if isinstance(record, RatedCompletion):
        parts.append(Text(", ".join(f"{visible(name)}: {value:g}" for name, value in record.ratings.items())))
    if isinstance(record, PreferencePair) and record.margin is not None:
        parts.append(Text(f"margin: {record.margin:g}"))
    if isinstance(record, Prompt):
        parts += [Text(f"requires {r.kind}: {dict(r.options)}") for r in record.requirements]
        parts.append(Text(f"id: {visible(record.id)}"))
    return parts


def _tokens(record: Record, renderer: Renderer) -> list[Text]:
    """The record's tokens as training sees them: the end of the prompt, then every completion whole."""
    branches: tuple[Branch, ...] = ()
    if isinstance(record, Prompt):
        prompt = renderer.prompt(record.content, record.source)
    else:
        if isinstance(record, LabelledCompletion | RatedCompletion):
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
    return f"<{token}>" if "\ufffd" in piece else visible(piece).replace("\n", "⏎")


def _content(name: str, content: Content, style: str) -> Text:
    text = Text()
    if isinstance(content, str):
        text.append(f"{name} (plain)\n", style=style)
        return text.append(visible(content))
    for k, turn in enumerate(content):
        text.append(f"{'' if k == 0 else chr(10)}{name}, {turn.role}\n", style=style)
        text.append(visible(turn.content))
    return text


def visible(text: str) -> str:
    """The text with control and direction characters spelled out: a terminal must not obey the data."""
    hidden = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
    return re.sub(hidden, lambda match: match.group().encode("unicode_escape").decode("ascii"), text)
