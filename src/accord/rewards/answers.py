"""`exact_answer`: the completion's final answer is the prompt's answer, as a number or as a text."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Literal, Self

from pydantic import Field, model_validator

from accord.rewards.base import REWARDS, Failed, Outcome, Pattern, RewardConfig, RewardKind, find_last, pointwise
from accord.types import Completion, Prompt

__all__ = ["ExactAnswerConfig", "as_number", "boxed", "exact_answer", "last_number", "marked", "same_text"]

_LONGEST = 60
"""Characters of a number; longer ones, and exponents of more than three digits, are none."""
_NUMERAL = re.compile(
    r"(?<![\w.])(?P<sign>[-+]?)\\?[$€£]?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"
    r"(?P<fraction>\.\d+)?(?P<exponent>[eE][-+]?\d+(?!\w))?(?:/(?P<over>\d+)(?![\d./]))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_LATEX_NOISE = re.compile(r"\\left|\\right|\\[,!;: ]|\$")


class ExactAnswerConfig(RewardConfig):
    """Settings of `exact_answer`."""

    extract: Literal["auto", "boxed", "marked", "whole"] = "auto"
    """Where the completion's answer is: in the last `\\boxed{}`, after the last `####` (`marked`), or `whole`: it is
    the text. `auto`: box, mark or whole, the first that is there. Where the truth is a number, the last number of that
    place counts, except for `whole`."""
    pattern: Pattern | None = None
    """In place of `extract`: a regular expression; the first group (or the whole) of its last match is the answer."""
    tolerance: float = Field(1e-6, ge=0, allow_inf_nan=False)
    """Largest difference of two numbers that count as equal."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.pattern is not None and self.extract != "auto":
            raise ValueError("give extract or pattern, not both")
        return self


def exact_answer(config: ExactAnswerConfig, prompt: Prompt, completion: Completion) -> Outcome:
    """1 if the completion's answer is the prompt's, else 0, as for a completion without an answer.

    Numbers are compared as numbers; texts without regard to case, white space, LaTeX spacing and a final full stop.
    """
    if not (prompt.answer or "").strip():
        return Failed("the prompt has no answer")
    truth = _truth(prompt.answer or "")
    given = _given(config, completion.text)
    if given is None:
        return 0.0
    wanted = as_number(truth)
    if wanted is None:
        return float(same_text(given, truth))
    number = as_number(given) if config.extract == "whole" else last_number(given)
    return float(number is not None and abs(number - wanted) <= config.tolerance)


def _truth(answer: str) -> str:
    """A worked solution ends with its answer, after `####` (GSM8K) or in a box (MATH)."""
    return _first(marked(answer), boxed(answer), answer).strip()


def _given(config: ExactAnswerConfig, text: str) -> str | None:
    if config.pattern is not None:
        return find_last(config.pattern, text)
    if config.extract == "boxed":
        return boxed(text)
    if config.extract == "marked":
        return marked(text)
    return _first(boxed(text), marked(text), text) if config.extract == "auto" else text


def _first(*texts: str | None) -> str:
    return next(text for text in texts if text is not None)


def boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}``, braces balanced; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place]
    return None


def marked(text: str) -> str | None:
    """The rest of the line after the last ``####``; None without one."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].rstrip() if mark else None


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly: 1,234.5, -3, 1/2, 2e3, \\frac{1}{2}, $5, 50 (of 50%); None without one.

    Example:
        >>> last_number("3 apples and then 1,200.50 more")
        Fraction(2401, 2)
    """
    numbers = [value for match in _NUMERAL.finditer(_plain(text)) if (value := _value(match)) is not None]
    return numbers[-1] if numbers else None


def as_number(text: str) -> Fraction | None:
    """The number that the whole text is, currency, per cent sign and a final full stop aside; None if it is none."""
    match = _NUMERAL.fullmatch(_plain(text).strip().rstrip(".%\\ $").lstrip("$"))
    return _value(match) if match else None


def same_text(one: str, other: str) -> bool:
    """Whether two texts say the same but for case, white space, width, LaTeX spacing and a final full stop."""
    return _bare(one) == _bare(other)


def _bare(text: str) -> str:
    text = _LATEX_NOISE.sub("", _LATEX_TEXT.sub(r"\1", unicodedata.normalize("NFKC", text)))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return "".join(text.casefold().split()).strip("\"'“”‘’*").rstrip(".").strip("\"'“”‘’*")


def _plain(text: str) -> str:
    return _LATEX_FRACTION.sub(r"\1/\2", text.replace("−", "-").replace("{,}", ","))


def _value(match: re.Match[str]) -> Fraction | None:
    sign, whole, fraction, exponent, over = match.group("sign", "whole", "fraction", "exponent", "over")
    if len(match[0]) > _LONGEST or len(exponent or "") > len("e+308") or int(over or 1) == 0:
        return None
    value = Fraction(f"{whole.replace(',', '') or '0'}{fraction or ''}{exponent or ''}") / int(over or 1)
    return -value if sign == "-" else value


REWARDS.add("exact_answer", RewardKind(ExactAnswerConfig, pointwise(exact_answer), needs="answer"))
