"""What every rule is: its name, how serious it is, what `--fix` does about it; and the row that a rule sees."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from accord.data.check.report import CheckReport
from accord.data.problems import Problem
from accord.data.sources import Row
from accord.data.usable import completions, prompt_of
from accord.types import Content, Ranking, Record, Source

__all__ = ["ENOUGH", "RULES", "Action", "Item", "Places", "Rule", "RuleFacts", "best_and_worst", "contents", "digest"]

Action = Literal["drop", "repair", "leave"]
"""What `--fix` does with a row that breaks a rule."""

ENOUGH = 50
"""Fewer comparisons, labels or completions than this say nothing about a rate."""


class RuleFacts(NamedTuple):
    """A rule in the register.

    Example: ``RuleFacts("error", "drop", "an empty prompt, message or completion")``
    """

    severity: Literal["error", "warning"]
    action: Action
    finds: str


RULES: dict[str, RuleFacts] = {
    "encoding": RuleFacts("error", "drop", "bytes that are not UTF-8"),
    "json": RuleFacts("error", "drop", "a line that is not a JSON object"),
    "csv": RuleFacts("error", "drop", "a line that does not fit the header"),
    "damaged": RuleFacts("error", "leave", "a file that cannot be read to its end"),
    "schema": RuleFacts("error", "drop", "columns of no known format, or a value of the wrong type"),
    "surrogate": RuleFacts("error", "repair", "half of a surrogate pair, which is no character"),
    "kind": RuleFacts("error", "drop", "a row that cannot be used for the kind of training asked for"),
    "empty": RuleFacts("error", "drop", "an empty prompt, message or completion"),
    "identical": RuleFacts("error", "drop", "chosen equal to rejected, or one completion with two ranks"),
    "ties": RuleFacts("error", "drop", "a ranking in which nothing is better than anything else"),
    "roles": RuleFacts("error", "drop", "a completion that does not begin and end with the assistant"),
    "duplicate-id": RuleFacts("error", "repair", "two prompts with the same id"),
    "overlap": RuleFacts("error", "drop", "a prompt that another data set has, too"),
    "left-out": RuleFacts("warning", "leave", "something that its format leaves out on purpose"),
    "near-overlap": RuleFacts("warning", "drop", "a prompt that is almost one of another data set"),
    "duplicate": RuleFacts("warning", "drop", "a record that occurs before, character for character"),
    "margin": RuleFacts("warning", "drop", "the row itself says that chosen is not better: its margin or probability"),
    "alternation": RuleFacts("warning", "repair", "user and assistant do not alternate"),
    "near-duplicate": RuleFacts("warning", "leave", "a prompt that is almost an earlier one"),
    "contradiction": RuleFacts(
        "warning", "leave", "for the same prompt, A is preferred to B here and B to A elsewhere"
    ),
    "cycle": RuleFacts("warning", "leave", "for the same prompt, A is preferred to B, B to C and C to A"),
    "truncated": RuleFacts("warning", "leave", "a completion that a token limit ended, as the row says"),
    "length-cap": RuleFacts("warning", "leave", "many completions of exactly the greatest length, cut in mid-sentence"),
    "unfinished": RuleFacts("warning", "leave", "the longest completions lack a last full stop, the others do not"),
    "template-tokens": RuleFacts("warning", "leave", "chat-template tokens inside a text"),
    "mixed-languages": RuleFacts("warning", "leave", "a completion in another language than its prompt"),
    "rare-language": RuleFacts("warning", "leave", "rows in another language than nearly all the others"),
    "personal-data": RuleFacts("warning", "leave", "an e-mail address, a phone, card or account number, ..."),
    "longer-wins": RuleFacts(
        "warning", "leave", "the longer completion wins so often that length explains the preference"
    ),
    "label-balance": RuleFacts("warning", "leave", "nearly all labels are the same"),
    "label-runs": RuleFacts("warning", "leave", "equal labels stand together: the rows are not shuffled"),
    "licence": RuleFacts("warning", "leave", "a licence that forbids commercial use"),
}
"""Every rule, errors first: how serious it is, what `--fix` does, and what it finds."""


@dataclass(slots=True)
class Item:
    """One row as the rules see it: its records, and those of them that no flaw makes useless.

    Example: ``Item(Source("a.jsonl", 1), {"prompt": "Hi"}, [prompt], [prompt])``
    """

    source: Source
    row: Row
    records: list[Record]
    sound: list[Record]


class Rule(ABC):
    """Sees every row of a data set in order."""

    @abstractmethod
    def see(self, item: Item) -> Iterator[Problem]:
        """What is wrong with this row."""

    def end(self, report: CheckReport) -> None:  # noqa: B027 - most rules need nothing but the rows
        """Add the figures and findings that only all rows together show."""


class Places:
    """Places as numbers, so that a million of them take little memory: the file's number, then the line in 40 bits."""

    _LINE_BITS = 40

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def number(self, source: Source) -> int:
        """The place as a number; later lines of a file have greater ones."""
        return self._files.setdefault(source.path, len(self._files)) << self._LINE_BITS | source.line

    def __getitem__(self, number: int) -> Source:
        return Source(list(self._files)[number >> self._LINE_BITS], number & ((1 << self._LINE_BITS) - 1))


def contents(record: Record) -> dict[str, Content]:
    """Prompt and completions by name."""
    return {"prompt": prompt_of(record), **completions(record)}


def best_and_worst(ranking: Ranking) -> tuple[Content, Content]:
    """One completion of the best rank and one of the worst."""
    order = sorted(zip(ranking.ranks, ranking.completions, strict=True), key=lambda item: item[0])
    return order[0][1], order[-1][1]


def digest(text: str) -> int:
    """64 bits that stand for the text: among ten million texts, two share them with a probability of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
