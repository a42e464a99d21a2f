"""What a program can check about a completion: length, format, keywords, language, refusal, a correct short answer.

A requirement is a kind and its options, in a file ``{"kind": "max_words", "count": 20}``. A blank text meets none.
To add a kind: a `Rule`, registered here or by an entry point of the group ``accord.requirements``.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from accord.config import Config
from accord.errors import ConfigError, UnknownNameError, unknown_name
from accord.registry import Registry
from accord.types import Requirement

__all__ = ["REQUIREMENTS", "Rule", "check", "describe", "met", "parse"]

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, StringConstraints(pattern=r"\S")]


class Rule(Config):
    """One kind of requirement; its fields are the options."""

    @abstractmethod
    def met(self, text: str) -> bool:
        """Whether a text that is not blank meets the requirement."""

    @abstractmethod
    def phrase(self) -> str:
        """The requirement in a few words, as a person would read it in a table."""


REQUIREMENTS: Registry[type[Rule]] = Registry("requirement", "accord.requirements")


def check(requirement: Requirement, text: str) -> bool:
    """Whether `text` meets `requirement`. A blank text meets none.

    Raises:
        ConfigError: unknown kind, or options that the kind does not take.
    """
    rule = _rule(requirement)
    return bool(text.strip()) and rule.met(text)


def met(requirements: Iterable[Requirement], text: str) -> tuple[bool, ...]:
    """One answer per requirement, in order."""
    return tuple(check(requirement, text) for requirement in requirements)


def describe(requirement: Requirement) -> str:
    """The requirement in a few words.

    Example:
        >>> describe(Requirement("max_words", {"count": 20}))
        'at most 20 words'
    """
    return _rule(requirement).phrase()


def parse(row: Mapping[str, Any], where: str = "requirement") -> Requirement:
    """Read ``{"kind": ..., option: value, ...}`` and validate it.

    Raises:
        ConfigError: no kind, unknown kind, or options that the kind does not take; it begins with `where`.
    """
    options = dict(row)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        fix = 'Write it as {"kind": "max_words", "count": 20}.'
        raise ConfigError(f"A requirement without a kind: {json.dumps(dict(row))}.", where=where, fix=fix)
    requirement = Requirement(kind, options)
    _rule(requirement, where)
    return requirement


def _rule(requirement: Requirement, where: str | None = None) -> Rule:
    if requirement.kind not in REQUIREMENTS:
        raise UnknownNameError(unknown_name("requirement", requirement.kind, list(REQUIREMENTS)), where=where)
    place = f"{where}: {requirement.kind}" if where else f"requirement {requirement.kind!r}"
    return REQUIREMENTS[requirement.kind].build(requirement.options, place)


# --- words and sentences ---------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+(?:['’.,-][^\W_]+)*")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|e\.g|i\.e|No|[A-Z])\.(?=\s)")
_LIST_MARK = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]*]*(?=\s|$)|\n+")
_FINISHED = re.compile(r"[.!?…][\"'”’»)\]*]*\s*$")


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _sentences(text: str) -> int:
    plain = _ABBREVIATION.sub(lambda match: match[0][:-1], _LIST_MARK.sub("", text))
    return sum(bool(_words(piece)) for piece in _SENTENCE_END.split(plain))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class _CountRule(Rule):
    count: Count


class MaxWords(_CountRule):
    """At most `count` words."""

    def met(self, text: str) -> bool:
        return 1 <= len(_words(text)) <= self.count

    def phrase(self) -> str:
        return f"at most {_plural(self.count, 'word')}"


class MinWords(_CountRule):
    """At least `count` words."""

    def met(self, text: str) -> bool:
        return len(_words(text)) >= self.count

    def phrase(self) -> str:
        return f"at least {_plural(self.count, 'word')}"


class ExactWords(_CountRule):
    """Exactly `count` words."""

    def met(self, text: str) -> bool:
        return len(_words(text)) == self.count

    def phrase(self) -> str:
        return f"exactly {_plural(self.count, 'word')}"


class Sentences(Rule):
    """`min` to `max` sentences, the last one finished. A line break ends a sentence."""

    min: Count | None = None
    max: Count | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self

    def met(self, text: str) -> bool:
        count = _sentences(text)
        return (self.min or 1) <= count <= (self.max or count) and _FINISHED.search(text) is not None

    def phrase(self) -> str:
        if self.min == self.max and self.min is not None:
            return f"exactly {_plural(self.min, 'sentence')}"
        if self.min is None:
            return f"at most {_plural(self.max or 1, 'sentence')}"
        return f"{self.min} to {self.max} sentences" if self.max else f"at least {_plural(self.min, 'sentence')}"


# --- keywords, beginning and end -------------------------------------------------------------------------------------


def _occurs(keyword: str, text: str) -> bool:
    """Whole words, any case, any white space between the words of a phrase."""
    pattern = r"\s+".join(re.escape(part) for part in keyword.casefold().split())
    return re.search(rf"(?<!\w){pattern}(?!\w)", text.casefold()) is not None


class Contains(Rule):
    """The word or phrase `keyword` occurs: whole words, any case."""

    keyword: Text

    def met(self, text: str) -> bool:
        return _occurs(self.keyword, text)

    def phrase(self) -> str:
        return f"mentions “{self.keyword}”"


class Excludes(Rule):
    """The word or phrase `keyword` does not occur."""

    keyword: Text

    def met(self, text: str) -> bool:
        return bool(_words(text)) and not _occurs(self.keyword, text)

    def phrase(self) -> str:
        return f"does not mention “{self.keyword}”"


_MARKS = " \t\r\n\"'“”‘’«»*_#"


class StartsWith(Rule):
    """Begins with `text`, any case; opening quotation marks and emphasis do not count."""

    text: Text

    def met(self, text: str) -> bool:
        start, rest = self.text.strip().casefold(), text.casefold().lstrip(_MARKS)
        whole_word = not start[-1].isalnum() or not rest[len(start) : len(start) + 1].isalnum()
        return rest.startswith(start) and whole_word

    def phrase(self) -> str:
        return f"begins with “{self.text}”"


class EndsWith(Rule):
    """Ends with `text`, any case; closing quotation marks do not count, nor does a full stop after a word."""

    text: Text

    def met(self, text: str) -> bool:
        end = self.text.strip().casefold()
        rest = text.casefold().rstrip(_MARKS + (".!?…,;:" if end[-1].isalnum() else ""))
        whole_word = not end[0].isalnum() or not rest[: -len(end)][-1:].isalnum()
        return rest.endswith(end) and whole_word

    def phrase(self) -> str:
        return f"ends with “{self.text}”"


# --- form ------------------------------------------------------------------------------------------------------------

_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+(.*\w.*)$", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d+)[.)][ \t]+(.*\w.*)$", re.MULTILINE)
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


def _distinct(items: Iterable[str]) -> int:
    return len({" ".join(_words(item)).casefold() for item in items})


class BulletList(Rule):
    """A list of exactly `items` different points, each on a line that begins with -, * or •."""

    items: Count

    def met(self, text: str) -> bool:
        points = _BULLET.findall(text)
        return len(points) == _distinct(points) == self.items

    def phrase(self) -> str:
        return f"a bulleted list of {_plural(self.items, 'item')}"


class NumberedList(Rule):
    """A list of exactly `items` different points, numbered 1, 2, … in order, each on a line of its own."""

    items: Count

    def met(self, text: str) -> bool:
        points = _NUMBERED.findall(text)
        in_order = [int(number) for number, _ in points] == list(range(1, self.items + 1))
        return in_order and _distinct(point for _, point in points) == self.items

    def phrase(self) -> str:
        return f"a numbered list of {_plural(self.items, 'item')}"


class Json(Rule):
    """The whole text (a code fence aside) is a JSON object that has `keys`, each with a value that is not empty."""

    keys: Annotated[list[Text], Field(min_length=1)]

    def met(self, text: str) -> bool:
        fenced = _FENCE.match(text.strip())
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and all(self._filled(value.get(key)) for key in self.keys)

    @staticmethod
    def _filled(value: Any) -> bool:
        return bool(value.strip()) if isinstance(value, str) else value is not None and value != [] and value != {}

    def phrase(self) -> str:
        return f"a JSON object with {', '.join(self.keys)}"


class AllLowercase(Rule):
    """No capital letter."""

    def met(self, text: str) -> bool:
        return text.islower()

    def phrase(self) -> str:
        return "all in lower case"


class AllUppercase(Rule):
    """No small letter."""

    def met(self, text: str) -> bool:
        return text.isupper()

    def phrase(self) -> str:
        return "all in capitals"


class NoCommas(Rule):
    """No comma."""

    def met(self, text: str) -> bool:
        return bool(_words(text)) and "," not in text

    def phrase(self) -> str:
        return "no commas"


class SingleLine(Rule):
    """One line."""

    def met(self, text: str) -> bool:
        return bool(_words(text)) and len(text.strip().splitlines()) == 1

    def phrase(self) -> str:
        return "a single line"


# --- language --------------------------------------------------------------------------------------------------------

_STOP_WORDS = {
    "en": "the a an and or but of to in on at for with from by is are was were be it this that you your we they he she "
    "i my not have has will can very there when what which as so do does",
    "es": "el la los las un una unos y o pero de del a en con por para es son está están era ser se me te mi tu su "
    "que qué como cómo muy más no sí hay yo tú él ella nosotros le lo al hola gracias días cuando también tiene bien",
    "fr": "le la les un une des et ou mais de du à au aux en dans avec par pour est sont était être ce cette il elle "
    "je tu nous vous ils on mon ma ton son sa que qui très plus ne pas bonjour merci l d c j s qu sur aussi bien",
    "de": "der die das den dem ein eine einen einem und oder aber von zu zum zur in im mit für auf aus bei ist sind "
    "war sein es ich du er sie wir ihr mein dein nicht sehr auch wie was wenn guten danke hallo tag hat haben kann man",
    "it": "il lo la i gli le un una e o ma di del della a al in con per è sono era che non molto più mi ti si io lui "
    "lei noi mio tuo suo come anche ciao grazie buongiorno giorno bene questo questa ha hanno nel",
    "pt": "o a os as um uma e ou mas de do da dos em no na com por para é são era que não muito mais eu ele ela nós "
    "meu minha seu sua como também olá obrigado dia bom bem este esta tem ao se",
}
_LANGUAGES = dict(en="English", es="Spanish", fr="French", de="German", it="Italian", pt="Portuguese")  # noqa: C408
_STOP_SETS = {code: frozenset(words.split()) for code, words in _STOP_WORDS.items()}


class Language(Rule):
    """Written in the language `code`: at least a fifth of the words are common words of it, more than of any other.

    A stop-word count: reliable for a sentence or more, not for a single word.
    """

    code: Literal["en", "es", "fr", "de", "it", "pt"]

    def met(self, text: str) -> bool:
        words = re.findall(r"[^\W\d_]+", text.casefold())
        hits = {code: sum(word in common for word in words) for code, common in _STOP_SETS.items()}
        own = hits.pop(self.code)
        return own > max(hits.values()) and 5 * own >= len(words)

    def phrase(self) -> str:
        return f"in {_LANGUAGES[self.code]}"


# --- refusal and answer ----------------------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:really |very |so )?sorry,? (?:but )?(?:I|this|that|we)\b"
    r"|\bI(?:'m| am) (?:not able|unable|not going|not comfortable|not willing|not allowed|not permitted)\b"
    r"|\b(?:I|we) (?:really |simply |just )?(?:can ?not|can't|won't|will not|must decline|have to decline|refuse)\b"
    r"(?! (?:wait|stress|emphasi[sz]e|recommend|believe|imagine|think of|say I|help (?:but|\w+ing))\b)"
    r"|\bI (?:do not|don't) (?:feel comfortable|condone|encourage)\b"
    r"|\b(?:can't|cannot|won't|unable to|not able to) "
    r"(?:help(?! (?:but|\w+ing)\b)|assist|provide|support|encourage|condone)\b",
    re.IGNORECASE,
)
_COMPLIES_ANYWAY = re.compile(
    r"\b(?:but|however|still|that said|here)\b[^.!?\n]{0,40}\bhere(?:'s| is| are)\b", re.IGNORECASE
)
_STEPS = re.compile(
    r"\bhere(?:'s| is| are)\b[^.!?\n]{0,30}\b(?:how|steps?|tips|ways?|guide|instructions)\b", re.IGNORECASE
)


def _refuses(text: str) -> bool:
    plain = text.replace("’", "'")
    opening = plain.lstrip()[:200]
    complies = _COMPLIES_ANYWAY.search(plain) or _STEPS.search(plain)
    return _REFUSAL.search(opening) is not None and complies is None


class Refuses(Rule):
    """Declines the request, early, and does not comply after all. A rule of thumb: it reads English phrases."""

    def met(self, text: str) -> bool:
        return _refuses(text)

    def phrase(self) -> str:
        return "refuses"


class DoesNotRefuse(Rule):
    """Does not decline the request."""

    def met(self, text: str) -> bool:
        return bool(_words(text)) and not _refuses(text)

    def phrase(self) -> str:
        return "does not refuse"


_UNITS = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # noqa: SIM905
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_NUMBERS = dict(zip([*_UNITS, *_TEENS], map(str, range(20)), strict=True))
for _ten, _word in enumerate(_TENS, start=2):
    _NUMBERS[_word] = str(10 * _ten)
    _NUMBERS |= {f"{_word}-{unit}": str(10 * _ten + value) for value, unit in enumerate(_UNITS[1:], start=1)}
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(sorted(_NUMBERS, key=len, reverse=True))})\b")
_NUMERAL = re.compile(r"(?<![\w.])(-?)(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?![\w]|\.\d)")


def _normalise(text: str) -> str:
    """Lower case, numbers as digits without separators or trailing zeros, a minus kept with its number."""
    plain = text.casefold().replace("−", "-").replace("’", "'")
    digits = _NUMBER_WORD.sub(lambda match: _NUMBERS[match[0]], plain)
    return _NUMERAL.sub(_plain_number, digits)


def _plain_number(match: re.Match[str]) -> str:
    sign, whole, fraction = match.groups()
    decimals = (fraction or "").rstrip("0").rstrip(".")
    return f"{'minus' if sign else ''}{whole.replace(',', '')}{decimals}"


class Answer(Rule):
    """One of the `accepted` answers occurs: whole words, any case, numbers in digits or (below 100) words.

    Pair it with a limit on length: a long text may name every answer.
    """

    accepted: Annotated[list[Text], Field(min_length=1)]

    def met(self, text: str) -> bool:
        given = _normalise(text)
        return any(
            re.search(rf"(?<![\w]){re.escape(_normalise(answer).strip())}(?!\w|\.\d)", given)
            for answer in self.accepted
        )

    def phrase(self) -> str:
        return f"answers {' or '.join(self.accepted)}"


_BUILT_IN: dict[str, type[Rule]] = {
    "all_lowercase": AllLowercase,
    "all_uppercase": AllUppercase,
    "answer": Answer,
    "bullet_list": BulletList,
    "contains": Contains,
    "does_not_refuse": DoesNotRefuse,
    "ends_with": EndsWith,
    "exact_words": ExactWords,
    "excludes": Excludes,
    "json": Json,
    "language": Language,
    "max_words": MaxWords,
    "min_words": MinWords,
    "no_commas": NoCommas,
    "numbered_list": NumberedList,
    "refuses": Refuses,
    "sentences": Sentences,
    "single_line": SingleLine,
    "starts_with": StartsWith,
}
for _name, _row in _BUILT_IN.items():
    REQUIREMENTS.add(_name, _row)
