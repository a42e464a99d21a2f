"""`accord quickstart`: the whole loop in small, on a real language model, with a report at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accord.evaluate.report import Report
    from accord.evaluate.reward import RewardReport
    from accord.loop.round import Result, Round

__all__ = ["quickstart"]


def quickstart(
    *,
    out: Path = Path("runs/quickstart"),
    seed: int = 0,
    config: Path | None = None,
    set: tuple[str, ...] = (),
    resume: bool = False,
) -> None:
    """The whole loop in small: sample, judge (a simulated panel), train, evaluate, report.

    Parameters
    ----------
    out
        Run directory; must be new unless --resume.
    seed
        Seed of everything random.
    config
        TOML file with settings over the built-in ones.
    set
        One setting, e.g. --set dpo.loss.beta=0.2; repeat for more.
    resume
        Continue the run in --out.
    """
    from accord.config import merge, parse_assignments, read_toml
    from accord.evaluate.report import write_report
    from accord.loop import Round, RoundConfig, quickstart_settings
    from accord.train import Run

    seeds = {"seed": seed, "reward": {"seed": seed}, "dpo": {"seed": seed}}
    layers = [quickstart_settings(), seeds, read_toml(config) if config else {}, parse_assignments(set)]
    settings = RoundConfig.build(merge(*layers), where=str(config) if config else "--set")
    this = Round(out, settings)
    Run.open(out, settings, this.facts(), resume=resume)
    print("The panel of three annotators is SIMULATED: programs judge the answers, not people.")
    result = this.run()
    report = _report(this, result, out)
    write_report(out, report)
    _say(result, report, out)


def _report(this: Round, result: Result, out: Path) -> Report:
    import json

    from accord.evaluate.report import Report
    from accord.tracking import read_metrics

    facts = json.loads((out / "dpo" / "provenance.json").read_text(encoding="utf-8"))
    return Report(
        title="Quickstart",
        simulated=True,
        baseline=this.config.model,
        candidate=str(this.model),
        comparison=result.comparison,
        reward=result.reward,
        panel=result.panel,
        training={"Reward model": read_metrics(out / "reward"), "DPO": read_metrics(out / "dpo")},
        stage_seconds=result.seconds,
        peak_memory=result.peak_memory,
        not_measured={
            "human preference": "the panel is simulated; collect judgements of people before you trust a preference",
            "quality beyond the requirements": "requirements check form and short facts; read the answers below",
            "safety": "this round trains on harmless requests and two or three refusals only",
        },
        provenance={
            "model": f"{facts['model']['name']} {facts['model']['hash']}",
            "data": f"{facts['data']['rows']} pairs {facts['data']['hash']}",
            "chat template": facts["template"],
            "seed": str(facts["seed"]),
            "machine": facts["machine"],
            **{f"version of {name}": version for name, version in facts["versions"].items()},
        },
        next_commands=_next(out),
    )


def _next(out: Path) -> list[str]:
    return [
        f"accord chat --model {out}/dpo/model",
        f"accord data check --data {out}/preferences.jsonl",
        f"accord train dpo --model starter --data {out}/preferences.jsonl --out runs/dpo --set loss.beta=0.2",
        f"accord evaluate reward --model {out}/reward/model --data {out}/preferences.jsonl --out runs/accuracy",
    ]


def _say(result: Result, report: Report, out: Path) -> None:
    from accord.evaluate.report.record import summary

    rate, reward = result.comparison.pass_rate, result.reward
    print(f"\n{summary(report)} (simulated panel)")
    if rate is not None:
        print(
            f"Held-out prompts that pass every requirement: {rate.before:.0%} → {rate.after:.0%} "
            f"({rate.difference:+.0%}, 95 % interval {rate.interval.low:+.0%} to {rate.interval.high:+.0%}, "
            f"exact McNemar p = {rate.p_value:.2g}, n = {rate.n})"
        )
    if result.comparison.kl is not None:
        print(f"KL from the baseline: {result.comparison.kl.mean:.1f} nats per answer")
    ceiling = _ceiling(reward)
    print(f"Reward model on held-out pairs: {reward.accuracy.value:.0%}{ceiling}")
    print(f"Time {sum(result.seconds.values()):.0f} s, peak memory {result.peak_memory / 1e9:.1f} GB")
    print(f"Report: {out / 'report.html'}\n\nNext:")
    for command in report.next_commands:
        print(f"  {command}")


def _ceiling(reward: RewardReport) -> str:
    if reward.ceiling is None or reward.ceiling.value is None:
        return ""
    return f", the simulated panel's own ceiling {reward.ceiling.value:.0%}"
