"""The report as one self-contained HTML page: own style sheet, inline SVG, no script, nothing from the network.

Texts of models and data are hostile until proven otherwise: everything is escaped, and the page forbids scripts itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from accord.evaluate.compare import Comparison, Measure
from accord.evaluate.report import words
from accord.evaluate.report.charts import Charts
from accord.evaluate.report.record import (
    RatingsPage,
    Report,
    RewardPage,
    change_of,
    random_sample,
    sorted_outcomes,
    summary,
)
from accord.evaluate.reward import RewardReport
from accord.feedback.quality import PanelAgreement
from accord.stats.agreement import Agreement
from accord.stats.intervals import Interval

__all__ = ["render_html", "render_ratings_html", "render_reward_html"]

# What a person looks at first in a training run; other metrics are in metrics.jsonl.
_CURVES = ("loss", "accuracy", "margin", "reward_margin", "kl", "grad_norm")
_CURVES_PER_STAGE = 3
_BADGES = {"improved": "meets more", "regressed": "meets fewer", "unchanged": "unchanged"}


def render_html(report: Report) -> str:
    """The whole page."""
    comparison = report.comparison
    rows = _forest(comparison)
    charts = Charts()
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=report,
            comparison=comparison,
            summary=summary(report),
            style=_style(),
            words=words,
            zip=zip,
            tiles=_tiles(report),
            missing=words.missing(comparison, report.not_measured),
            forest=rows,
            scale=_points_scale(rows),
            unit_scale=_unit_scale(),
            distributions=_distributions(comparison, charts),
            **(_reward(report.reward, report.panel, charts) if report.reward else {}),
            annotators=_annotators(report.panel) if report.panel else [],
            training=_training(report.training, charts),
            longest=max(report.stage_seconds.values(), default=0.0) or 1.0,
            **_texts(comparison),
        )
    )


def render_reward_html(page: RewardPage) -> str:
    """The page of a reward model alone."""
    accuracy = page.reward.accuracy
    members = [
        _share_row(f"Member {place}", each.value, each.interval, each.n)
        for place, each in enumerate(page.ensemble.members if page.ensemble else (), start=1)
    ]
    return (
        _environment()
        .get_template("reward.html.jinja")
        .render(
            page=page,
            reward=page.reward,
            members=members,
            summary=f"Orders {words.percent(accuracy.value, 1)} of {accuracy.n:,} pairs as the annotators do "
            f"(95 % interval {words.shares(accuracy.interval)}).",
            style=_style(),
            words=words,
            unit_scale=_unit_scale(),
            **_reward(page.reward, None, Charts()),
        )
    )


def render_ratings_html(page: RatingsPage) -> str:
    """The page of a reward model of ratings."""
    better = sum(row.rmse < row.mean_rmse for row in page.attributes)
    total = f"{len(page.attributes)} attribute{'s' * (len(page.attributes) > 1)}"
    return (
        _environment()
        .get_template("ratings.html.jinja")
        .render(page=page, summary=f"Nearer than the mean on {better} of {total}.", style=_style(), words=words)
    )


def _style() -> Markup:
    return Markup(files("accord.evaluate.report").joinpath("page.css").read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("accord.evaluate.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps a value to a percentage of a plot's width; `factor` and `suffix` say how ticks read."""

    low: float
    high: float
    ticks: tuple[float, ...]
    zero: float = 0.0
    factor: float = 1.0
    suffix: str = ""

    def __call__(self, value: float) -> str:
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}"

    def label(self, tick: float) -> str:
        """The tick in words."""
        return f"{tick * self.factor:g}{self.suffix}".replace("-", "−")


def _unit_scale() -> Scale:
    return Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0), zero=0.5, factor=100, suffix=" %")


def _points_scale(rows: list[dict[str, Any]]) -> Scale:
    """Symmetric around zero, wide enough for every interval."""
    reach = max((abs(row[end]) for row in rows for end in ("low", "high")), default=0.1)
    step = next(step for step in (0.05, 0.1, 0.2, 0.25, 0.5) if 2 * step >= reach or step == 0.5)
    return Scale(-2 * step, 2 * step, tuple(step * tick for tick in (-2, -1, 0, 1, 2)), factor=100)


def _tiles(report: Report) -> list[dict[str, Any]]:
    comparison, absent = report.comparison, words.missing(report.comparison, report.not_measured)
    tiles: list[dict[str, Any]] = []
    for name, measure in _headlines(comparison).items():
        verdict = comparison.verdicts[name]
        if measure is None:
            tiles.append(_tile(name, "missing", verdict, None, [absent[words.LABELS[name]]]))
            continue
        style = {"Better": "better", "Worse": "worse"}.get(verdict, "open")
        tiles.append(_tile(name, style, verdict, words.change(name, measure.difference), _evidence(measure)))
    length = comparison.length
    now = words.value("length", length.after)
    notes = [
        f"from {words.value('length', length.before)}",
        words.interval("length", length.interval),
        f"n = {length.n}",
    ]
    tiles.append(_tile("length", "cost", now, words.change("length", length.difference), notes))
    if comparison.kl is None:
        tiles.append(_tile("kl", "missing", "Not measured", None, [absent[words.LABELS["kl"]]]))
    else:
        bounds = comparison.kl.interval
        notes = [words.numbers(bounds), f"n = {comparison.kl.n}"]
        tiles.append(_tile("kl", "cost", f"{comparison.kl.mean:.2f} nats", "per answer", notes))
    return tiles


def _tile(name: str, style: str, verdict: str, change: str | None, notes: list[str]) -> dict[str, Any]:
    return {"label": words.LABELS[name], "style": style, "verdict": verdict, "change": change, "notes": notes}


def _headlines(comparison: Comparison) -> dict[str, Measure | None]:
    return {name: getattr(comparison, name) for name in comparison.verdicts}


def _evidence(measure: Measure) -> list[str]:
    before, after = words.value(measure.name, measure.before), words.value(measure.name, measure.after)
    bounds = words.interval(measure.name, measure.interval)
    p = words.p_value(words.adjusted(measure))
    return [f"{before} → {after}", bounds, f"{p} · n\u00a0=\u00a0{measure.n}"]


def _forest(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for measure in (comparison.pass_rate, comparison.requirements):
        if measure is not None:
            rows.append({"label": words.LABELS[measure.name], "headline": True, **_forest_numbers(measure)})
    for kind in sorted(comparison.kinds, key=lambda kind: -kind.difference):
        rows.append({"label": kind.kind.replace("_", " "), "headline": False, **_forest_numbers(kind)})
    return rows


def _forest_numbers(measure: Any) -> dict[str, Any]:
    bounds: Interval = measure.interval
    return {
        "n": measure.n,
        "before": words.percent(measure.before),
        "after": words.percent(measure.after),
        "low": bounds.low,
        "point": measure.difference,
        "high": bounds.high,
        "direction": "up" if bounds.low > 0 else "down" if bounds.high < 0 else "",
        "difference": words.change("pass_rate", measure.difference, unit=False),
        "interval": words.interval("pass_rate", bounds),
    }


def _distributions(comparison: Comparison, charts: Charts) -> list[dict[str, Any]]:
    outcomes, length = comparison.outcomes, comparison.length
    shown = [
        {
            "title": "Length",
            "note": f"per answer: {words.value('length', length.before)} → {words.value('length', length.after)}",
            "svg": charts.distributions(
                [row.tokens_before for row in outcomes], [row.tokens_after for row in outcomes], "tokens"
            ),
        }
    ]
    if (reward := comparison.reward) is not None:
        pairs = [
            (row.reward_before, row.reward_after)
            for row in outcomes
            if row.reward_before is not None and row.reward_after is not None
        ]
        margin = f"margin over the baseline {words.change('reward', reward.difference)}"
        shown.append(
            {
                "title": "Reward",
                "note": f"{margin} ({words.interval('reward', reward.interval)})",
                "svg": charts.distributions([pair[0] for pair in pairs], [pair[1] for pair in pairs], "reward"),
            }
        )
    if comparison.kl is not None:
        shown.append(
            {
                "title": "KL from the baseline",
                "note": "log-ratio summed over each answer, nats",
                "svg": charts.distribution([row.kl for row in outcomes if row.kl is not None], "nats"),
            }
        )
    return shown


def _reward(reward: RewardReport, panel: PanelAgreement | None, charts: Charts) -> dict[str, Any]:
    """What reward_part.html.jinja shows."""
    return {
        "accuracies": _accuracies(reward, panel),
        "reliability": charts.reliability(reward.calibration),
        "slices": [_share_row(name, each.value, each.interval, each.n) for name, each in reward.slices.items()],
    }


def _accuracies(reward: RewardReport, panel: PanelAgreement | None) -> list[dict[str, Any]]:
    model, longer, ceiling = reward.accuracy, reward.longer_wins, words.ceiling(reward, panel)
    rows = [_share_row("Reward model", model.value, model.interval, model.n, headline=True)]
    if ceiling is not None:
        rows += _agreement_rows({"Ceiling: one more annotator": ceiling})
    if longer is not None:
        rows.append(_share_row("Longer wins", longer.value, longer.interval, longer.n))
    if (length := reward.length) is not None:
        if length.matched is not None:
            rows.append(
                _share_row("Of pairs of like length", length.matched.value, length.matched.interval, length.matched.n)
            )
        rows.append(
            _share_row("Without the effect of length", length.without.value, length.without.interval, length.without.n)
        )
    return rows


def _annotators(panel: PanelAgreement) -> list[dict[str, Any]]:
    return _agreement_rows({"Any two annotators": panel.pairwise, **panel.annotators})


def _agreement_rows(named: Mapping[str, Agreement]) -> list[dict[str, Any]]:
    return [
        _share_row(name, measure.value, measure.interval, measure.pairs)
        for name, measure in named.items()
        if measure.value is not None
    ]


def _share_row(label: str, value: float, bounds: Interval | None, n: int, *, headline: bool = False) -> dict[str, Any]:
    low, high = bounds or (value, value)
    return {
        "label": label,
        "headline": headline,
        "n": n,
        "low": low,
        "point": value,
        "high": high,
        "direction": ("up" if low > 0.5 else "down" if high < 0.5 else "") if headline else "",
        "value": words.percent(value, 1),
        "interval": words.shares(bounds) if bounds else "",
    }


def _training(training: Mapping[str, Sequence[Mapping[str, float]]], charts: Charts) -> list[dict[str, Any]]:
    stages = []
    for name, rows in training.items():
        known = [metric for metric in _CURVES if any(metric in row for row in rows)][:_CURVES_PER_STAGE]
        drawn = []
        for metric in known:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            first, last = points[0][1], points[-1][1]
            drawn.append(
                {
                    "title": metric.replace("_", " "),
                    "note": f"{first:.3g} → {last:.3g}".replace("-", "−"),
                    "svg": charts.curve([step for step, _ in points], [value for _, value in points], metric),
                }
            )
        if drawn:
            stages.append({"name": name, "note": f"{len(rows)} steps logged", "charts": drawn})
    return stages


def _texts(comparison: Comparison) -> dict[str, Any]:
    sample = random_sample(comparison)
    cards = [
        {
            "outcome": outcome,
            "change": change_of(outcome),
            "badge": _badge(outcome.passed_before, outcome.passed_after) or _BADGES[change_of(outcome)],
            "random": outcome.prompt_id in sample,
        }
        for outcome in sorted_outcomes(comparison)
    ]
    counts = {change: sum(card["change"] == change for card in cards) for change in _BADGES}
    filters = [
        {"key": "random", "label": "Random sample", "count": len(sample)},
        {"key": "regressed", "label": "Regressed", "count": counts["regressed"]},
        {"key": "improved", "label": "Improved", "count": counts["improved"]},
        {"key": "unchanged", "label": "Unchanged", "count": counts["unchanged"]},
        {"key": "all", "label": "All", "count": len(cards)},
    ]
    return {"cards": cards, "filters": filters}


def _badge(before: bool, after: bool) -> str | None:
    """What happened to the prompt as a whole, where that changed."""
    return None if before == after else "now passes" if after else "no longer passes"
