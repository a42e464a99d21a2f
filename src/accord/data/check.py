"""The data doctor: reads everything that `--data` names and reports what would spoil a training run, with places."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from accord.data.load import UNREAD, read_records, require_kind
from accord.data.problems import Problem
from accord.data.usable import Kind, completions, flaws, pairs, prompt_of, squash, unusable, usable
from accord.errors import RowError
from accord.types import Content, LabelledCompletion, Message, PreferencePair, Prompt, Ranking, Record, Source

__all__ = ["RULES", "CheckReport", "Finding", "Severity", "check"]

Severity = Literal["error", "warning"]

RULES: dict[str, tuple[Severity, str]] = {
    "encoding": ("error", "bytes that are not UTF-8"),
    "json": ("error", "a line that is not a JSON object"),
    "csv": ("error", "a line that does not fit the header"),
    "damaged": ("error", "a file that cannot be read to its end"),
    "schema": ("error", "columns of no known format, or a value of the wrong type"),
    "kind": ("error", "a row that cannot be used for the kind of training asked for"),
    "empty": ("error", "an empty prompt, message or completion"),
    "identical": ("error", "chosen equal to rejected, or one completion with two ranks"),
    "ties": ("error", "a ranking in which nothing is better than anything else"),
    "roles": ("error", "a completion that does not begin and end with the assistant"),
    "duplicate-id": ("error", "two prompts with the same id"),
    "alternation": ("warning", "user and assistant do not alternate"),
    "duplicate": ("warning", "a record that occurs before, character for character"),
    "contradiction": ("warning", "for the same prompt, A is preferred to B here and B to A elsewhere"),
    "template-tokens": ("warning", "chat-template tokens inside a text"),
    "longer-wins": ("warning", "the longer completion wins so often that length explains the preference"),
    "label-balance": ("warning", "nearly all labels are the same"),
}
"""Every rule, errors first: how serious it is, and what it finds."""

_TEMPLATE_TOKEN = re.compile(r"<\|[a-z_]{2,30}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜[^｜]{2,30}｜>")
_PLACES = 5
_ENOUGH = 50
"""Fewer comparisons or labels than this say nothing about a rate."""
_LONGER_WINS_LIMIT = 0.65
_LABEL_LIMIT = 0.9


@dataclass(slots=True)
class Finding:
    """What one rule found: how often, the first few places, an example sentence and the way out.

    Example: ``Finding("empty", count=2, places=[Source("a.jsonl", 3)], what="The prompt is empty.", fix="...")``
    """

    rule: str
    what: str
    fix: str | None = None
    count: int = 0
    places: list[Source] = field(default_factory=list)

    @property
    def severity(self) -> Severity:
        """`error` stops training, `warning` deserves a look."""
        return RULES[self.rule][0]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        places = f" ({', '.join(map(str, self.places))}{more})" if self.places else ""
        return f"{self.severity}  {self.rule}  {self.count:,}×  {self.what}{places}"


@dataclass(slots=True)
class CheckReport:
    """The findings, errors first, and the figures of a data set. `str(report)` is the whole report as text."""

    spec: str
    rows: int = 0
    records: Counter[str] = field(default_factory=Counter)
    figures: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def has_errors(self) -> bool:
        """Whether anything was found that stops training."""
        return any(finding.severity == "error" for finding in self.findings)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(self.records.items()))
        lines = [f"{self.spec}: {self.rows:,} rows, {kinds or 'no record'}"]
        lines += [f"{name}: {value}" for name, value in self.figures.items()]
        lines += [str(finding) for finding in self.findings] or ["No problem found."]
        return "\n".join(lines)


def check(spec: str, kind: Kind | None = None) -> CheckReport:
    """Examine every row of a file, directory or hub data set; never stops at a bad row.

    Args:
        spec: what to read (`accord.data.sources.read_rows`).
        kind: also report rows that cannot be used for this kind of training.

    Raises:
        MissingDataError, EmptyDataError, DataError: nothing to read.
    """
    if kind is not None:
        require_kind(kind)
    doctor = _Doctor(spec, kind)
    try:
        for source, _, records in read_records(spec, doctor.note):
            doctor.examine(records, source)
    except RowError as error:
        path, _, line = (error.where or spec).rpartition(":")
        doctor.note(Problem("damaged", Source(path, int(line)), error.what, error.fix))
    return doctor.report()


class _Doctor:
    """Keeps what the rules must remember between rows; texts are remembered as 16-byte digests."""

    def __init__(self, spec: str, kind: Kind | None) -> None:
        self.kind = kind
        self.result = CheckReport(spec)
        self.findings: dict[str, Finding] = {}
        self.seen: dict[bytes, Source] = {}
        self.ids: dict[str, Source] = {}
        self.winners: dict[tuple[bytes, frozenset[bytes]], tuple[bytes, Source]] = {}
        self.lengths: Counter[str] = Counter()
        self.labels: Counter[bool] = Counter()

    def note(self, problem: Problem) -> None:
        finding = self.findings.setdefault(problem.rule, Finding(problem.rule, problem.what, problem.fix))
        finding.count += 1
        if len(finding.places) < _PLACES:
            finding.places.append(problem.source)
        if problem.rule in UNREAD:
            self.result.rows += 1

    def examine(self, records: list[Record], source: Source) -> None:
        self.result.rows += 1
        self.result.records.update(type(record).__name__ for record in records)
        if self.kind is not None:
            selected = usable(records, self.kind, str(source))
            if not selected:
                self.note(unusable(records[0], self.kind).at(source))
            records = selected
        for record in records:
            broken = [flaw.at(source) for flaw in flaws(record)]
            for problem in [*broken, *_texts(record, source), *self._repeated(record, source)]:
                self.note(problem)
            if not broken:
                self._compare(record, source)

    def _repeated(self, record: Record, source: Source) -> Iterator[Problem]:
        if isinstance(record, Prompt):
            first = self.ids.setdefault(record.id, source)
            if first != source:
                yield Problem("duplicate-id", source, f"Also the id of {first}: {record.id!r}.", "Number the prompts.")
        told = record.ranks if isinstance(record, Ranking) else getattr(record, "label", None)
        key = _digest(repr((type(record).__name__, _contents(record), told)))
        first = self.seen.setdefault(key, source)
        if first != source:
            yield Problem("duplicate", source, f"The same record as {first}.", "Remove one, or keep it as a weight.")

    def _compare(self, record: Record, source: Source) -> None:
        if isinstance(record, LabelledCompletion):
            self.labels[record.label] += 1
        for pair in pairs(record) if isinstance(record, Ranking) else [record]:
            if isinstance(pair, PreferencePair):
                self._pair(pair, source)

    def _pair(self, pair: PreferencePair, source: Source) -> None:
        longer = len(squash(pair.chosen)) - len(squash(pair.rejected))
        self.lengths["longer" if longer > 0 else "shorter" if longer < 0 else "equal"] += 1
        better, worse = _digest(squash(pair.chosen)), _digest(squash(pair.rejected))
        key = (_digest(squash(pair.prompt)), frozenset([better, worse]))
        winner, first = self.winners.setdefault(key, (better, source))
        if winner != better:
            fix = "Keep the majority, or leave both if annotators really disagree."
            self.note(Problem("contradiction", source, f"The opposite preference is at {first}.", fix))

    def report(self) -> CheckReport:
        self._lengths()
        self._labels()
        order = list(RULES)
        self.result.findings = sorted(self.findings.values(), key=lambda finding: order.index(finding.rule))
        return self.result

    def _lengths(self) -> None:
        unequal = self.lengths["longer"] + self.lengths["shorter"]
        if not unequal:
            return
        rate = self.lengths["longer"] / unequal
        text = f"{rate:.0%} of {unequal:,} pairs of different length"
        self.result.figures["longer completion wins"] = text
        if unequal >= _ENOUGH and rate > _LONGER_WINS_LIMIT:
            fix = "Expect a preference for length: report length beside every score, or balance the pairs."
            what = f"The longer completion wins in {text}."
            self.findings["longer-wins"] = Finding("longer-wins", what, fix, self.lengths["longer"])

    def _labels(self) -> None:
        total = self.labels.total()
        if not total:
            return
        rate = self.labels[True] / total
        self.result.figures["labels true"] = f"{rate:.0%} of {total:,}"
        if total >= _ENOUGH and not 1 - _LABEL_LIMIT <= rate <= _LABEL_LIMIT:
            what = f"{rate:.0%} of {total:,} labels are true."
            fix = "Weight the rarer label, or collect more of it."
            self.findings["label-balance"] = Finding("label-balance", what, fix, max(self.labels.values()))


def _texts(record: Record, source: Source) -> Iterator[Problem]:
    """Faults of the texts themselves, one per rule: template tokens, turns out of order."""
    for name, content in _contents(record).items():
        token = _TEMPLATE_TOKEN.search(content if isinstance(content, str) else "\n".join(t.content for t in content))
        if token:
            what = f"The {name} holds {token.group()!r}, which a chat template would write itself."
            yield Problem("template-tokens", source, what, "Give the text without the template, as messages.")
            break
    prompt = prompt_of(record)
    for name, completion in completions(record).items() or [("prompt", ())]:
        if not isinstance(prompt, str) and not isinstance(completion, str) and not _alternates(prompt + completion):
            what = f"The turns up to the {name} do not alternate between user and assistant, user first."
            fix = "Many chat templates refuse this: join neighbouring turns of the same role."
            yield Problem("alternation", source, what, fix)
            break


def _alternates(turns: tuple[Message, ...]) -> bool:
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    return all(turn.role == ("user", "assistant")[k % 2] for k, turn in enumerate(spoken))


def _contents(record: Record) -> dict[str, Content]:
    return {"prompt": prompt_of(record), **completions(record)}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
