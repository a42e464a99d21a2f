"""One trained model against its own baseline, paired by prompt.

Everything here is a reduction over `PairedOutcome` records. The unit is the prompt. Headline metrics are those where
more is better; their p-values are adjusted together (Holm 1979). Length and KL are what the change cost: they get an
interval and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from accord.errors import DataError, EmptyDataError
from accord.stats.intervals import Interval, bootstrap_mean
from accord.stats.paired import minimum_detectable_effect, paired_binary, paired_mean

__all__ = ["Comparison", "Estimate", "KindChange", "Measure", "PairedOutcome", "Verdict", "compare", "holm"]

Verdict = Literal["Better", "Worse", "Can't tell", "Not measured"]

SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class PairedOutcome:
    """One held-out prompt, answered by the baseline (before) and by the candidate (after).

    `requirements[i]` is the kind of requirement i, `met_before[i]` and `met_after[i]` whether the answers meet it, and
    `phrases[i]` says it in words for people (left out: the kinds). Rewards are those of one reward model. `kl` is the
    sum over the candidate's own completion tokens of log π_candidate − log π_baseline, in nats; if they were sampled
    from the candidate at temperature 1, its mean over prompts is an unbiased estimate of KL(candidate ‖ baseline).

    Example: ``PairedOutcome("p-001", "Name a colour.", ("max_words",), (False,), (True,), "I like blue.", "Blue", 4, 1,
    reward_before=-0.3, reward_after=0.9, kl=1.2)``
    """

    prompt_id: str
    prompt: str
    requirements: tuple[str, ...]
    met_before: tuple[bool, ...]
    met_after: tuple[bool, ...]
    text_before: str
    text_after: str
    tokens_before: int
    tokens_after: int
    reward_before: float | None = None
    reward_after: float | None = None
    kl: float | None = None
    phrases: tuple[str, ...] = ()

    @property
    def passed_before(self) -> bool:
        """Whether the baseline's answer meets every requirement."""
        return all(self.met_before)

    @property
    def passed_after(self) -> bool:
        """Whether the candidate's answer meets every requirement."""
        return all(self.met_after)

    @property
    def change(self) -> float:
        """Difference of the shares of requirements met, −1 … 1; 0 for a prompt without requirements."""
        return _share(self.met_after) - _share(self.met_before)


@dataclass(frozen=True, slots=True)
class Measure:
    """One paired metric: `difference` = after − before, with its 95 % interval.

    `name` is one of pass_rate, requirements, reward (headlines), length. Shares are in 0 … 1, length in tokens.
    `p_adjusted` is `p_value` after Holm across the measured headlines. `n` counts prompts.
    """

    name: str
    n: int
    before: float
    after: float
    difference: float
    interval: Interval
    p_value: float
    p_adjusted: float | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` prompts with its 95 % interval."""

    n: int
    mean: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class KindChange:
    """Requirements of one kind: shares met before and after, and the paired difference over the prompts that ask it.

    A prompt that asks the same kind several times counts as met when all of them are met.
    """

    kind: str
    n: int
    before: float
    after: float
    difference: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found. A metric that was not measured is None, and `verdicts` says so in words.

    `detectable` is the smallest change of the pass rate that this many prompts, as many of them changing as here, would
    show with 80 % power; None if no change could be shown.
    `improved` and `worsened` count prompts that pass only after, or only before.
    """

    n: int
    verdicts: dict[str, Verdict]
    pass_rate: Measure | None
    requirements: Measure | None
    reward: Measure | None
    length: Measure
    kl: Estimate | None
    kinds: tuple[KindChange, ...]
    improved: int
    worsened: int
    detectable: float | None
    outcomes: tuple[PairedOutcome, ...]

    @property
    def headlines(self) -> tuple[Measure, ...]:
        """The measured headline metrics."""
        return tuple(measure for measure in (self.pass_rate, self.requirements, self.reward) if measure is not None)


def compare(outcomes: Iterable[PairedOutcome]) -> Comparison:
    """Reduce paired outcomes to differences with intervals, exact tests and verdicts.

    Raises:
        EmptyDataError: no outcome at all.
        DataError: two outcomes of one prompt, requirements and results that do not line up, or a value that is not
            finite.
    """
    rows = tuple(outcomes)
    _check(rows)
    checked = [row for row in rows if row.requirements]
    rewarded = [
        (row.reward_before, row.reward_after)
        for row in rows
        if row.reward_before is not None and row.reward_after is not None
    ]
    diverged = [row.kl for row in rows if row.kl is not None]
    length = _mean("length", [float(row.tokens_before) for row in rows], [float(row.tokens_after) for row in rows])
    headlines: dict[str, Measure | None] = dict.fromkeys(("pass_rate", "requirements", "reward"))
    if checked:
        headlines["pass_rate"] = _binary([row.passed_before for row in checked], [row.passed_after for row in checked])
        shares = [_share(row.met_before) for row in checked], [_share(row.met_after) for row in checked]
        headlines["requirements"] = _mean("requirements", *shares)
    if rewarded:
        headlines["reward"] = _mean("reward", [before for before, _ in rewarded], [after for _, after in rewarded])
    judged = _judge([measure for measure in headlines.values() if measure is not None])
    verdicts: dict[str, Verdict] = dict.fromkeys(headlines, "Not measured")
    verdicts.update({name: measure.verdict for name, measure in judged.items() if measure.verdict is not None})
    return Comparison(
        n=len(rows),
        verdicts=verdicts,
        pass_rate=judged.get("pass_rate"),
        requirements=judged.get("requirements"),
        reward=judged.get("reward"),
        length=length,
        kl=_estimate(diverged),
        kinds=_kinds(checked),
        improved=sum(row.passed_after > row.passed_before for row in checked),
        worsened=sum(row.passed_after < row.passed_before for row in checked),
        detectable=_detectable(checked),
        outcomes=rows,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the k-th smallest of m is multiplied by m − k + 1, made monotone, capped at 1."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _check(rows: tuple[PairedOutcome, ...]) -> None:
    if not rows:
        raise EmptyDataError("There is no outcome to compare.", fix="Give at least one held-out prompt.")
    seen: set[str] = set()
    for row in rows:
        where = f"prompt {row.prompt_id!r}"
        if row.prompt_id in seen:
            fix = "Compare one answer per prompt: the prompt is the unit of every interval."
            raise DataError("Two outcomes of one prompt.", where=where, fix=fix)
        seen.add(row.prompt_id)
        asked = len(row.requirements)
        if len(row.met_before) != asked or len(row.met_after) != asked or len(row.phrases) not in (0, asked):
            raise DataError(f"{asked} requirements, but another number of results.", where=where)
        numbers = [value for value in (row.reward_before, row.reward_after, row.kl) if value is not None]
        if not all(map(math.isfinite, numbers)):
            raise DataError("A reward or KL is not a finite number.", where=where, fix="Check the model's weights.")


def _share(met: Sequence[bool]) -> float:
    return sum(met) / len(met) if met else 0.0


def _binary(before: list[bool], after: list[bool]) -> Measure:
    test = paired_binary(before, after)
    return Measure("pass_rate", test.n, test.before, test.after, test.difference, test.interval, test.p_value)


def _mean(name: str, before: list[float], after: list[float]) -> Measure:
    test = paired_mean(before, after)
    return Measure(name, test.n, test.before, test.after, test.difference, test.interval, test.p_value)


def _judge(measures: list[Measure]) -> dict[str, Measure]:
    judged = {}
    for measure, p_adjusted in zip(measures, holm([measure.p_value for measure in measures]), strict=True):
        clear = p_adjusted < SIGNIFICANCE
        verdict: Verdict = ("Better" if measure.difference > 0 else "Worse") if clear else "Can't tell"
        judged[measure.name] = replace(measure, p_adjusted=p_adjusted, verdict=verdict)
    return judged


def _detectable(rows: list[PairedOutcome]) -> float | None:
    changed = sum(row.passed_before != row.passed_after for row in rows)
    if not changed:
        return None
    effect = minimum_detectable_effect(len(rows), changed / len(rows))
    return effect if effect < 1 else None


def _estimate(values: list[float]) -> Estimate | None:
    return Estimate(len(values), fmean(values), bootstrap_mean(values)) if values else None


def _kinds(rows: list[PairedOutcome]) -> tuple[KindChange, ...]:
    changes = []
    for kind in sorted({kind for row in rows for kind in row.requirements}):
        asked = [row for row in rows if kind in row.requirements]
        before = [_meets(row.requirements, row.met_before, kind) for row in asked]
        after = [_meets(row.requirements, row.met_after, kind) for row in asked]
        test = paired_binary(before, after)
        changes.append(KindChange(kind, test.n, test.before, test.after, test.difference, test.interval))
    return tuple(changes)


def _meets(kinds: Sequence[str], met: Sequence[bool], kind: str) -> bool:
    return all(result for name, result in zip(kinds, met, strict=True) if name == kind)
