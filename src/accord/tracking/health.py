"""Health of a run: a few rules over its metrics, and a line when one of them begins to hold and when it is over.

What a rule says depends on the rows of metrics.jsonl alone, and on nothing that a clock measures. So health.jsonl of a
run that was killed and resumed is that of one that was not. docs/metrics.md explains metrics and rules.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, variance

from accord.files import disk_errors, write_text

__all__ = ["HEALTH_FILE", "RULES", "Health", "HealthFile", "History", "Notice", "Rule"]

HEALTH_FILE = "health.jsonl"

_WINDOW = 10
"""Steps whose mean a rule looks at, steps at the start of a run that it compares with, and steps without it after which
it is over."""
_LONG = 50
_EVALUATIONS = 3
_SURE = 4.0
"""A mean has moved where it differs by so many standard errors: rules look at every step, and must not see noise."""

_KL_PER_TOKEN, _KL_AT_LEAST, _KL_TARGETS = 0.2, 10.0, 2.0
_LENGTH_FACTOR, _LENGTH_TOKENS = 2.0, 16.0
_ENTROPY_SHARE, _ENTROPY_NATS = 0.2, 0.05
_FAILED = 0.1
_CHANCE = 0.55
_SUNK = 1.0
_WORSE = 1.02

Row = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class History:
    """What the rules see of a run so far.

    Example: ``History(steps=3, first=rows[:10], recent=rows[-50:], heldout=[0.61, 0.58])``
    """

    steps: int
    """Rows so far."""
    first: Sequence[Row]
    recent: Sequence[Row]
    heldout: Sequence[float] = ()
    """Every held-out loss."""

    def now(self, metric: str, window: int = _WINDOW) -> list[float]:
        """The values in the last rows; none while there are fewer rows, or where less than half of them have it."""
        return _most(list(self.recent)[-window:], metric, window)

    def before(self, metric: str) -> list[float]:
        """The values in the run's first rows; none until these have left the last ones."""
        return _most(self.first, metric, _WINDOW) if self.steps >= 2 * _WINDOW else []


@dataclass(frozen=True, slots=True)
class Rule:
    """A way for a run to be ill.

    Attributes:
        when: in words, for docs/metrics.md.
        seen: the numbers, while it holds; else None.
        why: why it matters.
        fix: what to do.
    """

    name: str
    when: str
    seen: Callable[[History], str | None]
    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class Notice:
    """A row of health.jsonl: a rule begins to hold after a step, or is over.

    Example: ``Notice(40, "version_lag", begins=True, message="sampling/version_lag is 6, above 4. …")``
    """

    step: int
    rule: str
    begins: bool
    message: str

    def __str__(self) -> str:
        return f"Step {self.step}, {self.rule}: {self.message}"


class Health:
    """Takes the metrics of a run, step after step, and speaks once when a rule begins to hold and once when it is over.

    Example:
        >>> health = Health()
        >>> for step in range(1, 11):
        ...     notices = health.see(step, {"sampling/version_lag": 6.0})
        >>> str(notices[0])[:56]
        'Step 10, version_lag: sampling/version_lag is 6, above 4'
    """

    def __init__(self) -> None:
        self._steps = 0
        self._first: list[Row] = []
        self._recent: deque[Row] = deque(maxlen=_LONG)
        self._heldout: list[float] = []
        self._healthy_for: dict[str, int] = {}

    def see(self, step: int, metrics: Row) -> list[Notice]:
        """What there is to say after this step."""
        row = {**metrics, **_kl_of(metrics)}
        self._steps += 1
        self._recent.append(row)
        if len(self._first) < _WINDOW:
            self._first.append(row)
        if "validation/loss" in row:
            self._heldout.append(row["validation/loss"])
        history = History(self._steps, self._first, self._recent, self._heldout)
        notices = [self._ask(rule, rule.seen(history), step) for rule in RULES]
        return [notice for notice in notices if notice is not None]

    def _ask(self, rule: Rule, seen: str | None, step: int) -> Notice | None:
        if seen is not None:
            begins = rule.name not in self._healthy_for
            self._healthy_for[rule.name] = 0
            said = f"{seen}. {rule.why} {rule.fix}"
            return Notice(step, rule.name, begins=True, message=said) if begins else None
        if rule.name in self._healthy_for:
            self._healthy_for[rule.name] += 1
            if self._healthy_for[rule.name] == _WINDOW:
                del self._healthy_for[rule.name]
                return Notice(step, rule.name, begins=False, message=f"over, for {_WINDOW} steps now.")
        return None


class HealthFile:
    """Keeps what `Health` says in ``run_dir/health.jsonl``; there is no such file while there is nothing to say.

    Args:
        rows: of metrics.jsonl, which the run goes on behind. What was said of them is written anew.

    Raises:
        ResourceError: the disk is full.
    """

    def __init__(self, run_dir: Path, rows: Iterable[Row] = ()) -> None:
        self._path, self._health = run_dir / HEALTH_FILE, Health()
        said = "".join(_line(notice) for row in rows for notice in self._health.see(int(row["step"]), row))
        if said or self._path.exists():
            write_text(self._path, said)

    def log(self, step: int, metrics: Row) -> list[Notice]:
        """What there is to say after this step; it is in the file already."""
        notices = self._health.see(step, metrics)
        if notices:
            with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.writelines(map(_line, notices))
        return notices


def _line(notice: Notice) -> str:
    return json.dumps(asdict(notice), ensure_ascii=False) + "\n"


def _most(rows: Sequence[Row], metric: str, window: int) -> list[float]:
    found = [row[metric] for row in rows if metric in row]
    return found if len(rows) == window and 2 * len(found) >= window else []


_KL = "KL of a completion"


def _kl_of(metrics: Row) -> dict[str, float]:
    """Nats between policy and reference over a sampled completion, whether the KL is in the reward or in the loss."""
    length = metrics.get("completions/mean_length")
    if length is None:
        return {}
    if "objective/kl" in metrics:
        return {_KL: metrics["objective/kl"]}
    return {_KL: metrics["kl"] * length} if "kl" in metrics else {}


def _moved(history: History, metric: str) -> tuple[float, float] | None:
    """The mean of the first rows and of the last ones, where they differ by more than noise."""
    before, now = history.before(metric), history.now(metric)
    if not before or not now:
        return None
    means = fmean(before), fmean(now)
    error = math.sqrt(variance(before) / len(before) + variance(now) / len(now))
    return means if abs(means[1] - means[0]) > _SURE * error else None


def _kl_runs_away(history: History) -> str | None:
    kls, lengths = history.now(_KL), history.now("completions/mean_length")
    if not kls or not lengths:
        return None
    kl, targets = fmean(kls), history.now("objective/kl_target")
    limit = _KL_TARGETS * fmean(targets) if targets else max(_KL_AT_LEAST, _KL_PER_TOKEN * fmean(lengths))
    aim = f" (the target is {fmean(targets):.3g})" if targets else ""
    return f"the KL of a completion is {kl:.3g} nats, above {limit:.3g}{aim}" if kl > limit else None


def _length_changes(history: History, *, grows: bool) -> str | None:
    metric = "completions/mean_length"
    before, now = history.before(metric), history.now(metric)
    if not before or not now:
        return None
    old, new = fmean(before), fmean(now)
    less, more = (old, new) if grows else (new, old)
    far = more > _LENGTH_FACTOR * less and more - less > _LENGTH_TOKENS
    return f"{metric} was {old:.3g} and is {new:.3g} tokens" if far else None


def _reward_is_hacked(history: History) -> str | None:
    moved = _moved(history, "reward")
    bought = _kl_runs_away(history) or _length_changes(history, grows=True)
    if moved is None or bought is None or moved[1] < moved[0]:
        return None
    return f"reward has risen from {moved[0]:.3g} to {moved[1]:.3g} while {bought}"


def _reward_falls(history: History) -> str | None:
    moved = _moved(history, "reward")
    return f"reward was {moved[0]:.3g} and is {moved[1]:.3g}" if moved and moved[1] < moved[0] else None


def _entropy_is_gone(history: History) -> str | None:
    now, before = history.now("entropy"), history.before("entropy")
    if not now:
        return None
    entropy, old = fmean(now), fmean(before) if before else 0.0
    if entropy < _ENTROPY_SHARE * old:
        return f"entropy was {old:.3g} and is {entropy:.3g} nats per token"
    return f"entropy is {entropy:.3g} nats per token, below {_ENTROPY_NATS:g}" if entropy < _ENTROPY_NATS else None


def _rewards_fail(history: History) -> str | None:
    names = {name for row in list(history.recent)[-_WINDOW:] for name in row if _is_share_of_failures(name)}
    shares = {name: fmean(values) for name in names if (values := history.now(name))}
    worst = max(sorted(shares), key=shares.__getitem__, default=None)
    return None if worst is None or shares[worst] <= _FAILED else f"{worst} is {shares[worst]:.3g}, above {_FAILED:g}"


def _is_share_of_failures(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/failed")


def _chosen_sinks(history: History) -> str | None:
    chosen, margins = _moved(history, "rewards/chosen"), _moved(history, "rewards/margins")
    if chosen is None or margins is None:
        return None
    fall, growth = chosen[0] - chosen[1], margins[1] - margins[0]
    if fall <= _SUNK or not 0 < growth < 2 * fall:
        return None
    return (
        f"rewards/margins has grown from {margins[0]:.3g} to {margins[1]:.3g} while rewards/chosen has fallen from "
        f"{chosen[0]:.3g} to {chosen[1]:.3g}"
    )


def _accuracy_is_chance(history: History) -> str | None:
    if not history.recent or "reward" in history.recent[-1]:  # online, pairs are new in every step
        return None
    for metric in ("rewards/accuracies", "accuracy"):
        values = history.now(metric, _LONG)
        if values and fmean(values) <= _CHANCE:
            return f"{metric} of the last {_LONG} steps is {fmean(values):.3g}"
    return None


def _heldout_rises(history: History) -> str | None:
    *earlier, last = history.heldout or [0.0]
    best = min(earlier[: 1 - _EVALUATIONS], default=math.inf)
    since = history.heldout[-_EVALUATIONS:]
    if math.isinf(best) or min(since) <= best or last <= best + (_WORSE - 1) * abs(best):
        return None
    return f"validation/loss was {best:.4g} at its lowest and is {last:.4g}"


def _beyond(metric: str, limit: float, *, above: bool) -> Callable[[History], str | None]:
    """The rule that the mean of a metric is above a limit, or below it; a mean on the limit is healthy."""

    def seen(history: History) -> str | None:
        values = history.now(metric)
        if not values:
            return None
        mean = fmean(values)
        ill = mean > limit if above else mean < limit
        return f"{metric} is {mean:.3g}, {'above' if above else 'below'} {limit:g}" if ill else None

    return seen


def _limit(name: str, metric: str, why: str, fix: str, *, above: float | None = None, below: float = 0.0) -> Rule:
    limit, words = (below, "below") if above is None else (above, "above")
    when = f"`{metric}` is {words} {limit:g}"
    return Rule(name, when, _beyond(metric, limit, above=above is not None), why, fix)


RULES: tuple[Rule, ...] = (
    Rule(
        "reward_hacking",
        "`reward` has risen, and `kl_runaway` or `length_explosion` holds",
        _reward_is_hacked,
        "The policy may please the reward and nobody else.",
        "Read samples.html before you believe it; give the KL more weight, stop earlier, or mend the reward.",
    ),
    Rule(
        "reward_fall",
        "`reward` is lower than in the run's first steps, by more than noise",
        _reward_falls,
        "The policy has become worse at what it learns.",
        "Lower optimizer.learning_rate, or take fewer updates per step (rollout.epochs).",
    ),
    Rule(
        "kl_runaway",
        f"The KL of a completion (`objective/kl`, or `kl` times its tokens) is above {_KL_AT_LEAST:g} nats and above "
        f"{_KL_PER_TOKEN:g} nats per token; with a target (`objective/kl_target`), above {_KL_TARGETS:g} times that",
        _kl_runs_away,
        "The policy has left the model that it started from, and what that knew goes with it.",
        "Give the KL more weight (kl_coefficient, or advantage.kl_target), or lower optimizer.learning_rate.",
    ),
    Rule(
        "length_explosion",
        f"`completions/mean_length` is more than {_LENGTH_FACTOR:g} times that of the run's first steps, and more than "
        f"{_LENGTH_TOKENS:g} tokens longer",
        lambda history: _length_changes(history, grows=True),
        "Many rewards and averages favour length as such.",
        "Read samples.html; if nothing is gained, add the reward length, use dr_grpo, or set rollout.overlong_buffer.",
    ),
    Rule(
        "length_collapse",
        f"`completions/mean_length` is less than 1/{_LENGTH_FACTOR:g} of that of the run's first steps, and more than "
        f"{_LENGTH_TOKENS:g} tokens shorter",
        lambda history: _length_changes(history, grows=False),
        "Answers end before they say anything, or the reward is had without them.",
        "Read samples.html; look for a reward that short answers win, and for penalties on length.",
    ),
    _limit(
        "truncated_completions",
        "completions/clipped_ratio",
        "Their rewards judge answers without an end.",
        "Raise sampling.max_new_tokens, or let the end pay: rollout.eos_penalty or rollout.overlong_buffer.",
        above=0.5,
    ),
    Rule(
        "entropy_collapse",
        f"`entropy` is below {_ENTROPY_NATS:g} nats per token, or below {_ENTROPY_SHARE:g} of that of the run's first "
        "steps",
        _entropy_is_gone,
        "Completions of a prompt become the same, and nothing new is found.",
        "Set loss.clip_high=0.28 or loss.entropy_coefficient, or sample at a higher temperature; at the highest reward "
        "it is the end of learning and no fault.",
    ),
    _limit(
        "no_advantage",
        "frac_reward_zero_std",
        "Prompts whose completions are all worth the same teach nothing.",
        "Choose prompts that are sometimes solved, raise rollout.completions, or set rollout.dynamic_sampling.",
        above=0.8,
    ),
    _limit(
        "clipped_ratios",
        "clip_ratio/region_mean",
        "So many tokens have no gradient: the updates of a step go too far from what sampled.",
        "Lower optimizer.learning_rate or rollout.epochs, or set rollout.kl_stop.",
        above=0.3,
    ),
    _limit(
        "small_sample",
        "effective_sample_size",
        "A few tokens with large ratios outweigh the rest: gradients are noise.",
        "Lower optimizer.learning_rate or rollout.epochs; let what samples be as new as what learns.",
        below=0.5,
    ),
    _limit(
        "version_lag",
        "sampling/version_lag",
        "Completions are of a policy that is long gone.",
        "Sample less ahead, with more samplers or smaller batches.",
        above=4,
    ),
    Rule(
        "failed_rewards",
        f"`rewards/LABEL/failed` of a reward is above {_FAILED:g}",
        _rewards_fail,
        "These completions are left out, and rarely by chance: what fails is longer, or odder.",
        "`rewards/LABEL/failed/REASON` says why: mend it, or give it more time.",
    ),
    Rule(
        "likelihood_displacement",
        "`rewards/margins` has grown, and `rewards/chosen` has fallen by more than half as much and more than "
        f"{_SUNK:g}",
        _chosen_sinks,
        "Chosen answers become less likely, too; what becomes likely instead stands in no data.",
        "Set loss.sft_weight, lower optimizer.learning_rate, or take a loss that holds chosen answers.",
    ),
    Rule(
        "accuracy_at_chance",
        f"`rewards/accuracies` or `accuracy` is not above {_CHANCE:g} over {_LONG} steps (not online)",
        _accuracy_is_chance,
        "Nothing tells chosen answers from rejected ones.",
        "See whether columns are swapped (`accord data check`); raise optimizer.learning_rate, or wait for warm-up.",
    ),
    Rule(
        "overfitting",
        f"`validation/loss` has not been as low as its lowest in {_EVALUATIONS} evaluations, and is "
        f"{100 * (_WORSE - 1):.0f} % above it",
        _heldout_rises,
        "The run learns its data by heart.",
        "The weights of the lowest loss are kept; set validation.patience to stop there, or fewer epochs.",
    ),
)
"""Every rule, in the order in which they speak."""
