"""What annotation tools export: a prompt, its answers by name, and what one person said of them.

The tools leave it to the project how the fields are called. The prompt is a field named prompt, instruction or
question; every other text field is an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accord.data.formats.base import LeftOut, content, number, places, string
from accord.data.formats.comparisons import answer, both_bad, compared
from accord.errors import RowError
from accord.types import (
    Content,
    Demonstration,
    LabelledCompletion,
    Message,
    Ranking,
    RatedCompletion,
    Record,
    Source,
)

__all__ = ["Task", "task"]

_PROMPTS = ("prompt", "instruction", "question")
_VERDICTS = {
    "good": True, "yes": True, "up": True, "positive": True, "accept": True, "true": True, "1": True,
    "bad": False, "no": False, "down": False, "negative": False, "reject": False, "false": False, "0": False,
}  # fmt: skip
_SIDES = {"a": 1, "left": 1, "first": 1, "b": -1, "right": -1, "second": -1, "tie": 0, "equal": 0}
_BOTH_BAD = ("both_bad", "bothbad", "tie_(bothbad)")


@dataclass(frozen=True, slots=True)
class Task:
    """The answers to one prompt, by name, in the order in which they were shown."""

    prompt: Content
    answers: Mapping[str, Content]
    source: Source

    def chosen(self, word: str) -> Sequence[Record | LeftOut]:
        """One word: for one answer good or bad; for two the name of the better one, left or right, tie, both bad."""
        key = word.strip().lower().replace(" ", "_")
        texts = list(self.answers.values())
        if len(texts) == 1 and key in _VERDICTS:
            return [LabelledCompletion(self.prompt, texts[0], _VERDICTS[key], self.source)]
        if len(texts) == 2:
            sides = _SIDES | {name.lower(): 1 - 2 * k for k, name in enumerate(self.answers)}
            if key in sides:
                return compared(self.prompt, texts[0], texts[1], sides[key], self.source)
            if key in _BOTH_BAD:
                return both_bad(self.prompt, texts[0], texts[1], self.source)
        return [LeftOut(f"What {word!r:.40} says of {len(texts)} answers is unknown.")]

    def ranked(self, ranks: Mapping[str, float]) -> list[Record]:
        """A rank for every answer, the smallest is the best.

        Raises:
            RowError: other names than those of the answers.
        """
        if set(ranks) != set(self.answers):
            what = f"The ranking names {', '.join(ranks) or 'nothing'}, but the answers are {', '.join(self.answers)}."
            raise RowError(what, where=str(self.source), fix="Name every answer once, as the fields are named.")
        numbered = places([ranks[name] for name in self.answers], self.source)
        return [Ranking(self.prompt, tuple(self.answers.values()), numbered, self.source)]

    def rated(self, ratings: Mapping[str, float]) -> Sequence[Record | LeftOut]:
        """Ratings of the only answer, by attribute.

        Raises:
            RowError: a number that is not finite.
        """
        if len(self.answers) != 1:
            return [LeftOut(f"Which of {len(self.answers)} answers the rating {', '.join(ratings)} is of is unknown.")]
        (text,) = self.answers.values()
        for name in ratings:
            string({"name": name}, "name", self.source)
            number(ratings, name, self.source)
        return [RatedCompletion(self.prompt, text, ratings, self.source)]

    def written(self, text: str) -> list[Record]:
        """An answer that the annotator wrote."""
        return [Demonstration(self.prompt, answer(string({"response": text}, "response", self.source)), self.source)]


def task(fields: Mapping[str, Any], source: Source) -> Task:
    """Find the prompt and the answers among the fields.

    Raises:
        RowError: no prompt, or a text of the wrong type.
    """
    name = next((name for name in _PROMPTS if fields.get(name) is not None), None)
    if name is None:
        what = f"None of the fields {', '.join(fields) or '(none)'} is the prompt."
        raise RowError(what, where=str(source), fix=f"Name it {', '.join(_PROMPTS[:-1])} or {_PROMPTS[-1]}.")
    stated = content(fields, name, source)
    prompt = stated if not isinstance(stated, str) else (Message("user", stated),)
    answers = {}
    for key, value in fields.items():
        if key != name and isinstance(value, str):
            answers[key] = answer(string(fields, key, source))
        elif key != name and isinstance(value, list) and _all_items(value):
            answers |= {str(item["id"]): answer(_body(item, source)) for item in value}
    return Task(prompt, answers, source)


def _all_items(value: Sequence[Any]) -> bool:
    return all(isinstance(item, dict) and "id" in item for item in value)


def _body(item: Mapping[str, Any], source: Source) -> str:
    name = next((name for name in ("body", "text", "html") if isinstance(item.get(name), str)), None)
    if name is None:
        what = f"The item {item['id']!r:.40} has no body."
        raise RowError(what, where=str(source), fix='Write {"id": "1", "body": "..."}')
    return string(item, name, source)
