"""Rules about languages, as py3langid tells them (naive Bayes over byte n-grams; Lui and Baldwin 2012)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from accord.data.check.report import CheckReport
from accord.data.check.rules import Item, Rule
from accord.data.problems import Problem
from accord.data.usable import completions, prompt_of
from accord.types import Content, Source

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

__all__ = ["Languages", "language"]

_LEAST, _MOST = 60, 160
"""Characters: a shorter text says little, and more of a longer one says nothing new."""
_CONFIDENCE = 0.99
_MAIN = 0.9
_LISTED = 5


class Languages(Rule):
    """The language of a prompt and of its first completion, where it is clear."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.places: dict[str, list[Source]] = {}

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.sound[:1]:
            asked, answered = language(prompt_of(record)), None
            for completion in list(completions(record).values())[:1]:
                answered = language(completion)
            own = answered or asked
            if own is not None:
                self.rows[own] += 1
                if len(self.places.setdefault(own, [])) < _LISTED:
                    self.places[own].append(item.source)
            if asked and answered and asked != answered:
                what = f"The prompt is in {asked!r}, the completion in {answered!r} (ISO 639)."
                fix = "Right for a translation; otherwise the model learns to answer in another language."
                yield Problem("mixed-languages", item.source, what, fix)

    def end(self, report: CheckReport) -> None:
        total = self.rows.total()
        if not total:
            return
        shown = [f"{code} {count / total:.1%}" for code, count in self.rows.most_common(5)]
        more = f", {len(self.rows) - 5} more" if len(self.rows) > 5 else ""
        report.figures["languages"] = f"{', '.join(shown)}{more} of {total:,} rows long enough to tell"
        (main, count), *others = self.rows.most_common()
        if others and count / total >= _MAIN:
            names = ", ".join(f"{code} {rows:,}" for code, rows in others[:_LISTED])
            what = f"Not in {main!r} as nearly all the others: {names}."
            examples = [
                Problem("rare-language", place, f"In {code!r}.") for code, _ in others for place in self.places[code]
            ]
            fix = "Remove them, or collect more of these languages: so few teach little and blur the rest."
            report.add("rare-language", what, fix, total - count, examples)


def language(content: Content) -> str | None:
    """The ISO 639 code of a text's language; None for a text that is short, mostly not letters, or not clear."""
    text = content if isinstance(content, str) else " ".join(turn.content for turn in content if turn.role != "system")
    text = " ".join(text[: 2 * _MOST].split())[:_MOST]
    if len(text) < _LEAST or sum(map(str.isalpha, text)) < 0.6 * len(text):
        return None
    code, confidence = _identifier().classify(text)
    return str(code) if confidence >= _CONFIDENCE else None


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
