"""What a report is made of. HTML, Markdown and JSON are three views of this one record."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from accord.evaluate.compare import Comparison, PairedOutcome
from accord.evaluate.reward import EnsembleReport, Overfit, RewardReport
from accord.evaluate.reward_ratings import AttributeReport
from accord.feedback.quality import PanelAgreement
from accord.stats.intervals import Interval

__all__ = ["Change", "RatingsPage", "Report", "RewardPage", "as_json", "change_of", "random_sample", "sorted_outcomes"]

RANDOM_SAMPLE = 10

Change = Literal["improved", "regressed", "unchanged"]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page shows.

    `simulated` marks the whole report: its preferences come from a program, not from people. `panel` is how far those
    who gave them agree; its ceiling stands beside the reward model's accuracy unless `reward` has its own. `training`
    maps a stage to its rows of metrics.jsonl, `stage_seconds` a stage to its duration, `not_measured` a thing (or one
    of pass_rate, requirements, reward, kl) to the reason why it was not measured, `provenance` a name (data, model,
    seeds, versions, hashes) to its value. `peak_memory` is in bytes.
    """

    title: str
    simulated: bool
    baseline: str
    candidate: str
    comparison: Comparison
    reward: RewardReport | None = None
    panel: PanelAgreement | None = None
    training: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    not_measured: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    next_commands: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class RewardPage:
    """What the page of a reward model alone shows; `ensemble` and `overfit` where they were measured."""

    model: str
    data: str
    reward: RewardReport
    ensemble: EnsembleReport | None = None
    overfit: Overfit | None = None

    def as_json(self) -> dict[str, Any]:
        """The page as plain JSON values: what was measured with it, then every number of the reward report."""
        rest = {"ensemble": self.ensemble, "overfit": self.overfit}
        measured = {name: asdict(value) for name, value in rest.items() if value is not None}
        return {"model": self.model, "data": self.data, **_plain(asdict(self.reward)), **_plain(measured)}


@dataclass(frozen=True, slots=True)
class RatingsPage:
    """What the page of a reward model of ratings shows; `unrated` names attributes that the data does not rate.

    Example: ``RatingsPage("runs/rm/model", "rated.jsonl", [evaluate_attribute("truth", [2.1], [2], mean=2.4)])``
    """

    model: str
    data: str
    attributes: Sequence[AttributeReport]
    unrated: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """The page as plain JSON values."""
        measured: dict[str, Any] = _plain(asdict(self))
        return measured


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON values; `simulated` and `summary` come first."""
    return {"simulated": report.simulated, "summary": summary(report), **_plain(asdict(report))}


def summary(report: Report) -> str:
    """The result in one sentence."""
    measured = report.comparison.headlines
    better = sum(measure.verdict == "Better" for measure in measured)
    worse = sum(measure.verdict == "Worse" for measure in measured)
    if not measured:
        return "No headline metric was measured."
    total = f"{len(measured)} headline metric{'s' * (len(measured) > 1)}"
    if better and not worse:
        return f"Better than its baseline on {better} of {total}, worse on none."
    if worse and not better:
        return f"Worse than its baseline on {worse} of {total}, better on none."
    if better and worse:
        return f"Mixed: better than its baseline on {better} of {total}, worse on {worse}."
    return f"No difference from its baseline can be told on {total}."


def change_of(outcome: PairedOutcome) -> Change:
    """Whether the share of requirements met went up, down, or stayed."""
    return "improved" if outcome.change > 0 else "regressed" if outcome.change < 0 else "unchanged"


def sorted_outcomes(comparison: Comparison) -> list[PairedOutcome]:
    """Biggest changes first, whatever their direction; of equal ones the regression first."""
    return sorted(comparison.outcomes, key=lambda outcome: (-abs(outcome.change), outcome.change, outcome.prompt_id))


def random_sample(comparison: Comparison) -> set[str]:
    """Prompt ids of a sample that nobody picked: the same for the same prompts, whatever the models answered."""
    ids = sorted(outcome.prompt_id for outcome in comparison.outcomes)
    return set(random.Random("report").sample(ids, min(RANDOM_SAMPLE, len(ids))))


def _plain(value: Any) -> Any:
    """Tuples become lists, mappings dictionaries with string keys; a number that JSON cannot hold becomes null."""
    if isinstance(value, Interval):
        return value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
