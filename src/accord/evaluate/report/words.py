"""How numbers and metrics read, the same in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from accord.evaluate.compare import Comparison, Measure
from accord.evaluate.reward import RewardReport
from accord.feedback.quality import PanelAgreement
from accord.stats.agreement import Agreement
from accord.stats.calibration import Calibration
from accord.stats.intervals import Interval

__all__ = [
    "LABELS",
    "adjusted",
    "alpha",
    "calibration",
    "ceiling",
    "change",
    "duration",
    "interval",
    "missing",
    "numbers",
    "p_value",
    "percent",
    "power",
    "shares",
    "value",
    "which_test",
]

LABELS = {
    "pass_rate": "Prompts fully met",
    "requirements": "Requirements met",
    "reward": "Reward",
    "length": "Length",
    "kl": "KL from the baseline",
}

NO_DATA = "no data for it in this run"
_UNITS = {"length": " tokens"}
_SHARES = ("pass_rate", "requirements")


def percent(share: float, digits: int = 0) -> str:
    """0.584 → "58 %"."""
    return f"{100 * share:.{digits}f} %"


def value(name: str, number: float) -> str:
    """A level: "58 %", "41.2 tokens", "0.83"."""
    return percent(number) if name in _SHARES else f"{_signless(number)}{_UNITS.get(name, '')}"


def change(name: str, number: float, *, unit: bool = True) -> str:
    """A difference, always with its sign: "+33 points", "−4.1 tokens", "+0.83"."""
    if name in _SHARES:
        return _signed(100 * number, 1) + (" points" if unit else "")
    digits = 1 if name == "length" else 2
    return _signed(number, digits) + (_UNITS.get(name, "") if unit else "")


def interval(name: str, bounds: Interval) -> str:
    """A 95 % interval of a difference: "+24.0 … +42.0"."""
    return f"{change(name, bounds.low, unit=False)} … {change(name, bounds.high, unit=False)}"


def points(difference: float) -> str:
    """A difference of two shares: "4.2 points"."""
    return _minus(f"{100 * difference:.1f} points")


def shares(bounds: Interval) -> str:
    """A 95 % interval of a share: "60.3 … 70.9 %"."""
    return f"{100 * bounds.low:.1f} … {100 * bounds.high:.1f} %"


def numbers(bounds: Interval) -> str:
    """A 95 % interval of a plain number: "0.47 … 0.58"."""
    return _minus(f"{bounds.low:.2f} … {bounds.high:.2f}")


def p_value(number: float) -> str:
    """ "p = 0.03", "p < 0.001"."""
    return "p < 0.001" if number < 0.001 else f"p = {number:.3f}" if number < 0.1 else f"p = {number:.2f}"


def adjusted(measure: Measure) -> float:
    """The p-value that the verdict rests on: of a headline metric after Holm, of another one as it is."""
    return measure.p_value if measure.p_adjusted is None else measure.p_adjusted


def power(comparison: Comparison) -> str:
    """How many differences exceed noise, and how small a one could have been seen."""
    measured = comparison.headlines
    clear = sum(measure.verdict in ("Better", "Worse") for measure in measured)
    verb = "exceeds" if clear == 1 else "exceed"
    text = f"{clear} of {len(measured)} headline differences {verb} noise on {comparison.n} prompts."
    if comparison.detectable is None:
        return text
    points = f"{100 * comparison.detectable:.1f} points"
    return f"{text} A change of the pass rate by {points} would have shown in four of five such runs."


def ceiling(reward: RewardReport, panel: PanelAgreement | None) -> Agreement | None:
    """What one more annotator would reach: the reward report's own figure, else the panel's."""
    return reward.ceiling if reward.ceiling is not None else panel.ceiling if panel is not None else None


def calibration(measure: Calibration) -> str:
    """How far the probabilities can be believed, in a sentence or two."""
    text = f"Calibration error {percent(measure.error, 1)}; of a calibrated model {shares(measure.null)}."
    if measure.temperature is None:
        return f"{text} No temperature fits the margins."
    return f"{text} Margins divided by {measure.temperature:.2f} would fit best."


def alpha(measure: Agreement) -> str:
    """Krippendorff's α in a sentence."""
    if measure.value is None:
        return f"Krippendorff's α is undefined: {measure.reason}"
    bounds = f" ({numbers(measure.interval)})" if measure.interval else ""
    return _minus(f"Krippendorff's α is {measure.value:.2f}{bounds}.")


def missing(comparison: Comparison, reasons: Mapping[str, str]) -> dict[str, str]:
    """What was not measured and why, by its label; a metric without data stands there even if nobody gave a reason."""
    absent = [name for name in (*comparison.verdicts, "kl") if getattr(comparison, name) is None]
    return {LABELS.get(name, name): reason for name, reason in {**dict.fromkeys(absent, NO_DATA), **reasons}.items()}


def which_test(measure: Measure) -> str:
    """Which test gave the p-value."""
    return "exact McNemar test" if measure.name == "pass_rate" else "paired permutation test"


def duration(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _signless(number: float) -> str:
    return _minus(f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}")


def _signed(number: float, digits: int) -> str:
    return _minus(f"{round(number, digits) + 0.0:+.{digits}f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")
