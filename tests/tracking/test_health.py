"""Every rule of health speaks on a made-up run that is ill in its way alone, at the step that arithmetic says, once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.config import Config
from accord.tracking import HEALTH_FILE, METRICS_FILE, RULES, Health, HealthFile, Notice, Tracking, read_metrics

Row = dict[str, float]

ONLINE = {
    "reward": 0.4,
    "completions/mean_length": 60.0,
    "completions/clipped_ratio": 0.1,
    "objective/kl": 3.0,
    "entropy": 1.2,
    "frac_reward_zero_std": 0.2,
    "clip_ratio/region_mean": 0.05,
    "effective_sample_size": 0.95,
    "sampling/version_lag": 0.0,
    "rewards/judge/failed": 0.0,
    "rewards/length/failed": 0.02,
    "rewards/judge/failed/timeout": 0.0,
}
OFFLINE = {"loss": 0.6, "rewards/accuracies": 0.65, "rewards/chosen": 0.1, "rewards/margins": 0.2}


def said(rows: list[Row]) -> list[tuple[int, str, bool]]:
    health = Health()
    return [(n.step, n.rule, n.begins) for step, row in enumerate(rows, 1) for n in health.see(step, row)]


def series(base: Row, steps: int, **changes: Callable[[int], Row]) -> list[Row]:
    """So many rows of a healthy run, each with what `change` makes of its number (from 0)."""
    change = changes.get("change", lambda _: {})
    return [{**base, **change(number)} for number in range(steps)]


def after(step: int, changed: Row, *otherwise: Row) -> Callable[[int], Row]:
    return lambda number: changed if number >= step else (otherwise[0] if otherwise else {})


# From the 21st row on the values are ill. A mean of ten passes a limit once n of these are in it: the comments.
ILL = [
    ("reward_fall", ONLINE, {"reward": 0.0}, 7),  # (0.4 n/10)² > 16·(0.4² n(10 − n)/90)/10: n > 6.4
    ("kl_runaway", ONLINE, {"objective/kl": 40.0}, 3),  # 3 + 3.7 n > 0.2·60: n = 3
    ("length_explosion", ONLINE, {"completions/mean_length": 200.0}, 5),  # 60 + 14 n > 120: n = 5
    ("length_collapse", ONLINE, {"completions/mean_length": 0.0}, 6),  # 60 − 6 n < 30: n = 6
    ("truncated_completions", ONLINE, {"completions/clipped_ratio": 1.0}, 5),  # 0.1 + 0.09 n > 0.5
    ("entropy_collapse", ONLINE, {"entropy": 0.1}, 9),  # 1.2 − 0.11 n < 0.24
    ("no_advantage", ONLINE, {"frac_reward_zero_std": 1.0}, 8),  # 0.2 + 0.08 n > 0.8
    ("clipped_ratios", ONLINE, {"clip_ratio/region_mean": 0.5}, 6),  # 0.05 + 0.045 n > 0.3
    ("small_sample", ONLINE, {"effective_sample_size": 0.0}, 5),  # 0.95 − 0.095 n < 0.5
    ("version_lag", ONLINE, {"sampling/version_lag": 10.0}, 5),  # n > 4
    ("failed_rewards", ONLINE, {"rewards/judge/failed": 0.3}, 4),  # 0.03 n > 0.1
]


@pytest.mark.parametrize(("rule", "base", "ill", "waits"), ILL, ids=[case[0] for case in ILL])
def test_a_rule_speaks_alone_and_once(rule: str, base: Row, ill: Row, waits: int) -> None:
    rows = series(base, 60, change=after(20, ill))
    assert said(rows) == [(20 + waits, rule, True)]


def test_a_healthy_run_hears_nothing() -> None:
    """Noise everywhere, a reward that rises, and an entropy that falls by half."""
    noise = random.Random(3)
    online, offline = [], []
    for step in range(300):
        better = {"reward": 0.4 + step / 600, "entropy": 1.2 - step / 500}
        online.append({name: value * noise.uniform(0.8, 1.2) for name, value in {**ONLINE, **better}.items()})
        chosen = {"rewards/chosen": 0.1 + step / 300, "rewards/margins": 0.2 + step / 100}
        offline.append({name: value * noise.uniform(0.8, 1.2) for name, value in {**OFFLINE, **chosen}.items()})
    assert said(online) == []
    assert said(offline) == []


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_noise_alone_is_no_fall_of_the_reward(seed: int) -> None:
    noise = random.Random(seed)
    assert said([{"reward": noise.gauss(0.5, 0.2)} for _ in range(120)]) == []


def test_reward_that_is_bought_with_kl_or_length_is_told_beside_them() -> None:
    rises: Row = {"reward": 0.9}
    kl = series(ONLINE, 40, change=after(20, {**rises, "objective/kl": 40.0}))
    assert [rule for _, rule, _ in said(kl)] == ["kl_runaway", "reward_hacking"]
    length = series(ONLINE, 40, change=after(20, {**rises, "completions/mean_length": 200.0}))
    assert [rule for _, rule, _ in said(length)] == ["length_explosion", "reward_hacking"]
    assert said(series(ONLINE, 40, change=after(20, rises))) == []
    falls = series(ONLINE, 40, change=after(20, {"reward": 0.1, "objective/kl": 40.0}))
    assert {rule for _, rule, _ in said(falls)} == {"kl_runaway", "reward_fall"}


def test_a_target_of_the_kl_says_what_is_too_much() -> None:
    """Twice the target, whether that is more than the limit without one or less."""

    def row(kl: float, target: float) -> Row:
        return {"objective/kl": kl, "objective/kl_target": target, "completions/mean_length": 60}

    assert said([row(39, 20)] * 10) == []
    assert said([row(41, 20)] * 10) == [(10, "kl_runaway", True)]
    assert said([row(2.1, 1)] * 10) == [(10, "kl_runaway", True)]


def test_kl_in_the_loss_is_per_token_and_short_completions_may_have_ten_nats() -> None:
    def row(kl: float, length: float) -> Row:
        return {"kl": kl, "completions/mean_length": length}

    assert said([row(0.2, 100)] * 10) == []  # 20 nats, 0.2 a token: the limit
    assert said([row(0.21, 100)] * 10) == [(10, "kl_runaway", True)]
    assert said([row(1.0, 10)] * 10) == []  # 10 nats of a completion: the limit
    assert said([row(1.1, 10)] * 10) == [(10, "kl_runaway", True)]
    assert said([{"kl": 30.0}] * 20) == []  # KTO's, of whole completions and offline


@pytest.mark.parametrize(
    ("metric", "limit", "beyond"),
    [
        ("completions/clipped_ratio", 0.5, 0.501),
        ("frac_reward_zero_std", 0.8, 0.801),
        ("clip_ratio/region_mean", 0.3, 0.301),
        ("effective_sample_size", 0.5, 0.499),
        ("sampling/version_lag", 4.0, 4.001),
        ("rewards/judge/failed", 0.1, 0.101),
        ("entropy", 0.05, 0.0499),
    ],
)
def test_on_a_limit_a_run_is_healthy(metric: str, limit: float, beyond: float) -> None:
    """Absolute limits need ten steps: the ninth is silent."""
    assert said([{metric: limit}] * 40) == []
    assert [step for step, _, _ in said([{metric: beyond}] * 40)] == [10]


def test_lengths_must_change_by_half_and_by_sixteen_tokens() -> None:
    def lengths(before: float, now: float) -> list[str]:
        base: Row = {"completions/mean_length": before}
        return [rule for _, rule, _ in said(series(base, 40, change=after(20, {"completions/mean_length": now})))]

    assert lengths(16, 32) == lengths(20, 40) == lengths(10, 26) == []
    assert lengths(16, 33) == lengths(20, 41) == ["length_explosion"]
    assert lengths(32, 16) == lengths(26, 10) == []
    assert lengths(33, 16) == ["length_collapse"]


def test_a_metric_that_few_steps_have_says_nothing() -> None:
    """Steps without updates have no entropy: a rule wants it in half of its steps."""
    assert said([{"entropy": 0.01} if number % 3 == 0 else {} for number in range(60)]) == []
    assert said([{"entropy": 0.01} if number % 2 == 0 else {} for number in range(60)]) == [
        (10, "entropy_collapse", True)
    ]


def test_likelihood_displacement_is_a_fall_of_chosen_that_feeds_the_margin() -> None:
    def moved(chosen: float, margin: float) -> list[str]:
        change = after(20, {"rewards/chosen": 0.1 + chosen, "rewards/margins": 0.2 + margin})
        return [rule for _, rule, _ in said(series(OFFLINE, 60, change=change))]

    assert moved(-2.0, 3.0) == ["likelihood_displacement"]
    assert moved(-1.4, 3.0) == []  # less than half of the margin
    assert moved(-0.9, 1.0) == []  # too little to matter
    assert moved(-2.0, -0.1) == []  # a run that goes wrong, but not in this way
    assert moved(2.0, 3.0) == []


@pytest.mark.parametrize("metric", ["accuracy", "rewards/accuracies"])
def test_accuracy_at_chance_waits_for_fifty_steps_and_for_offline_runs(metric: str) -> None:
    assert said([{metric: 0.5}] * 60) == [(50, "accuracy_at_chance", True)]
    assert said([{metric: 0.56}] * 60) == []
    assert said([{metric: 0.5, "reward": 0.1}] * 60) == []


def test_overfitting_is_three_evaluations_without_a_lower_loss() -> None:
    def evaluated(*losses: float) -> list[tuple[int, str, bool]]:
        return said([{"validation/loss": loss} for loss in losses])

    assert evaluated(1.0, 0.8, 0.81, 0.82, 0.83) == [(5, "overfitting", True)]
    assert evaluated(1.0, 0.8, 0.81, 0.82, 0.815) == []  # within 2 % of the lowest
    assert evaluated(1.0, 0.8, 0.9, 0.9, 0.79) == []
    assert evaluated(1.0, 0.9) == []


def test_a_verdict_ends_once_after_ten_steps_without_it_and_may_come_again() -> None:
    """Values of 10 and 0: the mean of ten is above 4 while five of them are 10."""

    def lag(number: int) -> Row:
        return {"sampling/version_lag": 10.0 if 10 <= number < 20 or number >= 60 else 0.0}

    # Rows 11 to 20 and from 61 on are ill: five of them first in row 15, last in row 25; row 35 is the tenth without.
    assert said(series({}, 80, change=lag)) == [
        (15, "version_lag", True),
        (35, "version_lag", False),
        (65, "version_lag", True),
    ]


def test_a_value_that_wavers_about_a_limit_does_not_chatter() -> None:
    rows = [{"sampling/version_lag": 4.0 + (0.5 if (number // 5) % 2 else -0.4)} for number in range(200)]
    assert [begins for _, _, begins in said(rows)] == [True]


def test_a_line_has_numbers_a_reason_and_a_remedy() -> None:
    health = Health()
    (notice,) = [n for step in range(1, 11) for n in health.see(step, {"completions/clipped_ratio": 0.75})]
    assert str(notice) == (
        "Step 10, truncated_completions: completions/clipped_ratio is 0.75, above 0.5. Their rewards judge answers "
        "without an end. Raise sampling.max_new_tokens, or let the end pay: rollout.eos_penalty or "
        "rollout.overlong_buffer."
    )
    assert all(rule.why.endswith(".") and rule.fix.endswith(".") for rule in RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_failed_rewards_name_the_worst() -> None:
    health = Health()
    row = {"rewards/a/failed": 0.2, "rewards/b/failed": 0.4, "rewards/b/failed/timeout": 0.4}
    (notice,) = [n for step in range(1, 11) for n in health.see(step, row)]
    assert notice.message.startswith("rewards/b/failed is 0.4, above 0.1.")


class Settings(Config):
    seed: int = 0


def ill_run() -> Iterator[tuple[int, Row]]:
    for step in range(1, 61):
        yield step, {**ONLINE, "sampling/version_lag": 9.0 if 10 <= step < 25 else 0.1, "reward": 0.4 + step % 3 / 7}


def test_verdicts_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracking(tmp_path, Settings(), resume_step=0) as tracking:
        for step, row in ill_run():
            tracking.log(step, row)
            assert (tmp_path / HEALTH_FILE).exists() == (step >= 14)
    kept = [Notice(**json.loads(line)) for line in (tmp_path / HEALTH_FILE).read_text().splitlines()]
    assert [(notice.step, notice.rule, notice.begins) for notice in kept] == [
        (14, "version_lag", True),
        (39, "version_lag", False),
    ]
    assert capsys.readouterr().err.splitlines() == [str(notice) for notice in kept]


@pytest.mark.parametrize("saved", [0, 12, 14, 20, 30, 45, 60])
@pytest.mark.parametrize("killed", [14, 31, 50, 60])
def test_a_run_that_was_killed_has_the_verdicts_of_one_that_was_not(saved: int, killed: int, tmp_path: Path) -> None:
    """It goes on from a checkpoint that is older than its last row, after a kill in the midst of writing a verdict."""
    if saved > killed:
        saved = killed
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for directory, stop in ((whole, 60), (resumed, killed)):
        with Tracking(directory, Settings(), resume_step=0) as tracking:
            for step, row in ill_run():
                if step <= stop:
                    tracking.log(step, row)
    with (resumed / HEALTH_FILE).open("a") as file:
        file.write('{"step": 5')
    with Tracking(resumed, Settings(), resume_step=saved) as tracking:
        for step, row in ill_run():
            if step > saved:
                tracking.log(step, row)
    for name in (METRICS_FILE, HEALTH_FILE):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_said_follows_from_the_rows_on_disk(tmp_path: Path) -> None:
    with Tracking(tmp_path, Settings(), resume_step=0) as tracking:
        for step, row in ill_run():
            tracking.log(step, row)
    again = tmp_path / "again"
    again.mkdir()
    HealthFile(again, read_metrics(tmp_path))
    assert (again / HEALTH_FILE).read_bytes() == (tmp_path / HEALTH_FILE).read_bytes()
