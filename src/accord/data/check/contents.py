"""Rules that need one row only: flaws, turns, template tokens, stop reasons, margins, personal data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from accord.data.check import personal
from accord.data.check.report import CheckReport
from accord.data.check.rules import Item, Rule, contents
from accord.data.problems import Problem
from accord.data.usable import completions, flaws, prompt_of
from accord.types import Content, Message, PreferencePair, Record, Source

__all__ = ["Alternation", "Flaws", "Margin", "PersonalData", "TemplateTokens", "Truncated", "disordered"]

_TEMPLATE_TOKEN = re.compile(r"<\|[a-z_]{2,30}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜[^｜]{2,30}｜>")
_STOP_COLUMNS = ("finish_reason", "stop_reason")
_CUT = ("length", "max_tokens", "max_length")


class Flaws(Rule):
    """What makes a record useless for any training: empty texts, nothing to compare, no turn to learn."""

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.records:
            found = [flaw.at(item.source) for flaw in flaws(record)]
            if not found:
                item.sound.append(record)
            yield from found


class TemplateTokens(Rule):
    """Chat-template tokens inside a text; one problem per record."""

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.records:
            for name, content in contents(record).items():
                token = _TEMPLATE_TOKEN.search(_text(content))
                if token:
                    what = f"The {name} holds {token.group()!r}, which a chat template would write itself."
                    fix = "Give the text without the template, as messages."
                    yield Problem("template-tokens", item.source, what, fix)
                    break


class Alternation(Rule):
    """After the system message user and assistant take turns, the user first."""

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.records:
            name = disordered(record)
            if name:
                what = f"The turns up to the {name} do not alternate between user and assistant, user first."
                fix = "Many chat templates refuse this: join neighbouring turns of the same role."
                yield Problem("alternation", item.source, what, fix)


class Truncated(Rule):
    """The row says that a limit ended the completion."""

    def see(self, item: Item) -> Iterator[Problem]:
        for column in _STOP_COLUMNS:
            if item.row.get(column) in _CUT:
                what = f"A limit ended the completion: {column} is {item.row[column]!r}."
                yield Problem("truncated", item.source, what, "Sample it again with more tokens, or remove the row.")


class Margin(Rule):
    """A margin says how much better chosen is, a probability how surely."""

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.records:
            if not isinstance(record, PreferencePair):
                continue
            for name, value, tie in (("margin", record.margin, 0.0), ("probability", record.probability, 0.5)):
                if value is not None and value <= tie:
                    meaning = "a tie" if value == tie else "that rejected is the better one"
                    what = f"The {name} {value:g} means {meaning}."
                    yield Problem("margin", item.source, what, "Remove the row, or swap chosen and rejected.")


class PersonalData(Rule):
    """What looks like a person's data; one problem per record, which does not repeat them."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.records:
            problem = self._first(record, item.source)
            if problem is not None:
                yield problem

    def _first(self, record: Record, source: Source) -> Problem | None:
        first = None
        for name, content in contents(record).items():
            for kind in personal.find(_text(content)):
                self.kinds[kind] += 1
                if first is None:
                    what = f"The {name} holds what looks like {kind}."
                    first = Problem("personal-data", source, what, "Mask it, or make sure that you may train on it.")
        return first

    def end(self, report: CheckReport) -> None:
        if self.kinds:
            counts = [f"{count:,} × {kind}" for kind, count in self.kinds.most_common()]
            report.figures["personal data"] = ", ".join(counts)


def disordered(record: Record) -> str | None:
    """The name of the first completion up to which the turns do not alternate, None if all do."""
    prompt = prompt_of(record)
    for name, completion in completions(record).items() or [("prompt", ())]:
        if not isinstance(prompt, str) and not isinstance(completion, str) and not _alternate(prompt + completion):
            return name
    return None


def _alternate(turns: tuple[Message, ...]) -> bool:
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    return all(turn.role == ("user", "assistant")[k % 2] for k, turn in enumerate(spoken))


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(turn.content for turn in content)
