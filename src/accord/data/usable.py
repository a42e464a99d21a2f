"""Which records serve which kind of training, and what makes a record unusable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal, NamedTuple, get_args

from accord.data.problems import Problem
from accord.types import (
    Content,
    Demonstration,
    LabelledCompletion,
    PreferencePair,
    Prompt,
    Ranking,
    RatedCompletion,
    Record,
    Source,
)

__all__ = [
    "KINDS",
    "Flaw",
    "Kind",
    "completions",
    "flaws",
    "labelled",
    "pairs",
    "prompt_of",
    "said",
    "squash",
    "unusable",
    "usable",
]

Kind = Literal["demonstrations", "preferences", "labels", "ratings", "prompts"]
"""What training or sampling reads: the records that a loss learns from, or prompts."""

KINDS: tuple[Kind, ...] = get_args(Kind)

_SERVES: dict[Kind, tuple[type, ...]] = {
    "demonstrations": (Demonstration,),
    "preferences": (PreferencePair, Ranking),
    "labels": (LabelledCompletion, PreferencePair),
    "ratings": (RatedCompletion,),
}
_NOUNS: dict[type, str] = {
    Demonstration: "a demonstration",
    PreferencePair: "a preference pair",
    Ranking: "a ranking",
    LabelledCompletion: "a labelled completion",
    RatedCompletion: "a rated completion",
    Prompt: "a prompt without a completion",
}


class Flaw(NamedTuple):
    """Why a record cannot be used.

    Example: ``Flaw("empty", "The completion is empty.", "Remove the row.")``
    """

    rule: str
    what: str
    fix: str

    def at(self, source: Source) -> Problem:
        """The flaw at the place where it was found."""
        return Problem(self.rule, source, self.what, self.fix)


def usable(records: Sequence[Record], kind: Kind, prompt_id: str) -> list[Record]:
    """Those records of one row that serve `kind`; every row has a prompt, named `prompt_id` unless it is one itself."""
    if kind == "labels":  # a row's own labels say more than what its pair implies
        records = [record for record in records if isinstance(record, LabelledCompletion)] or records
    if kind != "prompts":
        return [record for record in records if isinstance(record, _SERVES[kind])]
    own: list[Record] = [record for record in records if isinstance(record, Prompt)]
    derived: list[Record] = [Prompt(prompt_id, prompt_of(record), source=record.source) for record in records]
    return (own or derived)[:1]


def unusable(record: Record, kind: Kind) -> Flaw:
    """Say why the record does not serve `kind`, and how to get data that does."""
    if kind == "demonstrations" and isinstance(record, PreferencePair | Ranking):
        fix = "To imitate the best completion, write it to a file with the columns prompt and completion."
    elif kind == "demonstrations" and isinstance(record, LabelledCompletion):
        fix = "To imitate the good completions, keep those rows and remove the column label."
    elif kind == "demonstrations":
        fix = "Add a column completion; a conversation must end with the assistant."
    elif kind == "labels" and isinstance(record, Ranking):
        fix = "A ranking says which is better, not which is good: write prompt, completion and label."
    elif kind == "labels":
        fix = "Give prompt, completion and label (true or false); docs/data.md lists the formats."
    elif kind == "ratings":
        fix = "Give prompt, completion and ratings (a number by attribute); docs/data.md lists the formats."
    else:
        fix = "Give prompt, chosen and rejected, or prompt, completions and ranks; docs/data.md lists the formats."
    return Flaw("kind", f"The row is {_NOUNS[type(record)]}, and {kind} are wanted.", fix)


def pairs(ranking: Ranking) -> list[PreferencePair]:
    """All strictly ordered pairs of a ranking, K(K-1)/2 without ties, the better-ranked completions first."""
    order = sorted(zip(ranking.ranks, ranking.completions, strict=True), key=lambda item: item[0])
    return [
        PreferencePair(ranking.prompt, better, worse, source=ranking.source)
        for (high, better), (low, worse) in combinations(order, 2)
        if high < low
    ]


def labelled(pair: PreferencePair) -> tuple[LabelledCompletion, LabelledCompletion]:
    """A pair as two labels: the chosen completion is good, the rejected one bad."""
    return (
        LabelledCompletion(pair.prompt, pair.chosen, label=True, source=pair.source),
        LabelledCompletion(pair.prompt, pair.rejected, label=False, source=pair.source),
    )


def completions(record: Record) -> dict[str, Content]:
    """The completions of a record by name; a ranking numbers them from 1."""
    if isinstance(record, PreferencePair):
        return {"chosen": record.chosen, "rejected": record.rejected}
    if isinstance(record, Ranking):
        return {f"completion {k}": text for k, text in enumerate(record.completions, 1)}
    return {} if isinstance(record, Prompt) else {"completion": record.completion}


def said(record: Record) -> str:
    """What a record says of its texts: ranks, label or ratings; of a prompt, its answer and requirements."""
    if isinstance(record, Ranking):
        return str(record.ranks)
    if isinstance(record, LabelledCompletion):
        return str(record.label)
    if isinstance(record, RatedCompletion):
        return str(sorted(record.ratings.items()))
    if isinstance(record, Prompt):
        return str((record.answer, [(need.kind, sorted(need.options.items())) for need in record.requirements]))
    return ""


def prompt_of(record: Record) -> Content:
    """The prompt of a record."""
    return record.content if isinstance(record, Prompt) else record.prompt


def flaws(record: Record) -> Iterator[Flaw]:
    """Everything that makes a record useless for any training: empty texts, no turn to learn, nothing to compare."""
    texts = completions(record)
    yield from _empty(prompt_of(record), "prompt")
    for name, text in texts.items():
        yield from _empty(text, name)
        if not isinstance(text, str) and text and {text[0].role, text[-1].role} != {"assistant"}:
            what = f"The {name} does not begin and end with the assistant."
            yield Flaw("roles", what, "Move what comes before the answer to the prompt, and drop what follows it.")
    if isinstance(record, PreferencePair) and squash(record.chosen) == squash(record.rejected):
        yield Flaw("identical", "Chosen and rejected are the same text.", "Remove the row: it says nothing.")
    if isinstance(record, Ranking):
        yield from _ranking(record)


def squash(content: Content) -> str:
    """The text with runs of white space as one space, roles included: equal for what a reader would call equal."""
    parts = [content] if isinstance(content, str) else [f"\0{turn.role}\0{turn.content}" for turn in content]
    return "".join(" ".join(part.split()) for part in parts)


def _ranking(record: Ranking) -> Iterator[Flaw]:
    if len(set(record.ranks)) < 2:
        fix = "Remove the row: a ranking needs a better and a worse completion."
        yield Flaw("ties", f"None of the {len(record.ranks)} completions is better than another.", fix)
    places: dict[str, int] = {}
    for text, rank in zip(record.completions, record.ranks, strict=True):
        if places.setdefault(squash(text), rank) != rank:
            yield Flaw("identical", "The same completion has two different ranks.", "Keep one of the two.")


def _empty(content: Content, name: str) -> Iterator[Flaw]:
    fix = "Remove the row, or write the missing text."
    if not content or (isinstance(content, str) and not content.strip()):
        yield Flaw("empty", f"The {name} is empty.", fix)
    elif not isinstance(content, str):
        for k, turn in enumerate(content, 1):
            if turn.role != "system" and not turn.content.strip():
                yield Flaw("empty", f"Message {k} ({turn.role}) of the {name} is empty.", fix)
