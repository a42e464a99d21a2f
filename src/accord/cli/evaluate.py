"""`accord evaluate compare|reward`: is the new model better than its baseline, and how good is a reward model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accord.errors import ConfigError

if TYPE_CHECKING:
    from accord.evaluate.report import RatingsPage, RewardPage
    from accord.types import Source

__all__ = ["compare", "reward"]


def compare(
    *,
    model: str,
    data: str,
    out: Path,
    baseline: str = "starter",
    reward_model: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Answer the same prompts with a model and its baseline, and write a report, paired by prompt.

    Parameters
    ----------
    model
        The candidate: hub id or directory.
    data
        Prompts, with requirements where a program can check them (docs/data.md).
    out
        Directory of report.html, report.json and report.md; must be new.
    baseline
        What the candidate is compared with.
    reward_model
        A reward model to score both answers with.
    seed
        Seed of everything random; both models get the same random numbers.
    limit
        Use this many prompts only.
    set
        One setting of the sampler, e.g. --set max_new_tokens=128; repeat for more.
    """
    from accord.config import parse_assignments
    from accord.data.load import load

    _require_new(out)
    loaded = load(data, "prompts", limit)
    prompts = loaded.records
    print(loaded.summary())

    from accord.evaluate.answers import answer, divergences, judged_trees, paired_outcomes, scores
    from accord.evaluate.compare import compare as reduce
    from accord.evaluate.report import Report, write_report
    from accord.evaluate.report.record import summary
    from accord.models.load import load_judge, load_policy
    from accord.models.render import signature
    from accord.sampling.request import SamplingConfig

    config = SamplingConfig.build(parse_assignments(set), where="--set")
    old = load_policy(baseline)
    before = answer(old, prompts, config, seed, "Answers before")
    new = load_policy(model)
    after = answer(new, prompts, config, seed, "Answers after")
    alike = signature(old.tokenizer)[0] == signature(new.tokenizer)[0]
    kl = divergences(old, prompts, after, "KL from baseline") if alike and not config.shaped else None
    rewards = None
    if reward_model is not None:
        judge = load_judge(reward_model)
        asked = [judged_trees(judge, *each) for each in ((old, prompts, before), (new, prompts, after))]
        both = [scores(judge, trees, "Rewards") for trees in asked]
        rewards = [(first[0], second[0]) for first, second in zip(*both, strict=True)]
    result = reduce(paired_outcomes(prompts, before, after, rewards=rewards, divergence=kl))
    reasons = {
        "reward": "" if rewards else "no --reward-model was given",
        "kl": _why_no_kl(alike=alike, shaped=config.shaped),
        "requirements": "" if result.requirements else "the prompts carry no requirements",
    }
    report = Report(
        title="Comparison",
        simulated=False,
        baseline=baseline,
        candidate=model,
        comparison=result,
        not_measured={name: reason for name, reason in reasons.items() if reason},
        provenance={"data": data, "seed": str(seed), "sampling": config.to_toml().replace("\n", "; ")},
        next_commands=[f"accord chat --model {model}"],
    )
    write_report(out, report)
    print(f"{summary(report)}\nReport: {out / 'report.html'}")


def _why_no_kl(*, alike: bool, shaped: bool) -> str:
    if not alike:
        return "the two models have different tokenizers"
    return "answers were not sampled at temperature 1 from the whole distribution" if shaped else ""


def reward(
    *,
    model: str,
    data: str,
    out: Path,
    kind: Literal["preferences", "ratings"] = "preferences",
    train: str | None = None,
    slice: str | None = None,
    limit: int | None = None,
) -> None:
    """Accuracy and calibration of a reward model on preferences it has not seen, or its errors on ratings.

    Parameters
    ----------
    model
        A reward model: hub id or directory.
    data
        Preference pairs or rankings; with --kind ratings, completions rated by attribute.
    out
        Directory of report.html and reward.json; must be new.
    kind
        preferences: does it order pairs as the annotators do? ratings: how near are the ratings that it predicts?
    train
        What it was trained on, to look for signs of overfitting.
    slice
        A column of the data: accuracy by its values.
    limit
        Use this many rows only.
    """
    from accord.data.load import load

    _require_new(out)
    if kind == "ratings":
        for name, value in {"--train": train, "--slice": slice}.items():
            if value is not None:
                raise ConfigError("It has no effect on ratings.", where=name, fix="Leave it out.")
        _ratings(model, data, out, limit)
        return
    loaded = load(data, "preferences", limit)
    print(loaded.summary())
    seen = load(train, "preferences", limit) if train else None
    slices = _column(data, slice) if slice else None

    from accord.evaluate.report import RewardPage, write_reward_page
    from accord.evaluate.reward import overfit, repeated_judgements
    from accord.evaluate.scored import score_pairs
    from accord.models.load import load_judge

    network = load_judge(model)
    scored = score_pairs(network, loaded.records, "Held-out pairs")
    report = scored.report(ceiling=repeated_judgements(loaded.records), slices=slices)
    page = RewardPage(
        model=model,
        data=data,
        reward=report,
        ensemble=scored.ensemble(),
        overfit=overfit(score_pairs(network, seen.records, "Training pairs").report(), report) if seen else None,
    )
    write_reward_page(out, page)
    _say(page)
    print(f"Report: {out / 'report.html'}")


def _ratings(model: str, data: str, out: Path, limit: int | None) -> None:
    from accord.data.load import load

    loaded = load(data, "ratings", limit)
    print(loaded.summary())

    from accord.evaluate.report import RatingsPage, write_reward_page
    from accord.evaluate.scored import rate
    from accord.models.load import load_judge

    page = RatingsPage(model, data, *rate(load_judge(model), loaded.records, "Ratings"))
    write_reward_page(out, page)
    _say_ratings(page)
    print(f"Report: {out / 'report.html'}")


def _say_ratings(page: RatingsPage) -> None:
    for row in page.attributes:
        interval = f" (95 % interval {row.interval.low:.2f} to {row.interval.high:.2f})" if row.interval else ""
        rank = "undefined" if row.spearman is None else f"{row.spearman:.2f}{interval}"
        print(f"{row.name}: error {row.rmse:.3f}, of the mean {row.mean_rmse:.3f}; Spearman {rank}; n = {row.n:,}")
    if page.unrated:
        print(f"not rated in this data: {', '.join(page.unrated)}")


def _say(page: RewardPage) -> None:
    reward = page.reward
    accuracy, calibration, ceiling = reward.accuracy, reward.calibration, reward.ceiling
    interval = f"{accuracy.interval.low:.3f} to {accuracy.interval.high:.3f}"
    print(f"accuracy {accuracy.value:.3f} (95 % interval {interval}, n = {accuracy.n:,})")
    if ceiling is not None and ceiling.value is not None:
        print(f"annotators agree {ceiling.value:.3f}")
    if reward.longer_wins is not None:
        print(f"longer wins {reward.longer_wins.value:.3f}")
    print(f"log-loss {reward.log_loss:.3f}, Brier {reward.brier:.3f}, mean margin {reward.margin:.3f}")
    null = calibration.null
    print(f"calibration error {calibration.error:.3f} (a calibrated model: {null.low:.3f} to {null.high:.3f})")
    for name, row in reward.slices.items():
        print(f"  {name}: {row.value:.3f} (n = {row.n:,})")
    for sign in page.overfit.signs if page.overfit else ():
        print(f"overfitting: {sign}")


def _column(data: str, column: str) -> dict[Source, str]:
    """The values of a column of the data, by row."""
    from accord.data.formats import split_format
    from accord.data.sources import read_rows

    values = {}
    for source, row in read_rows(split_format(data)[0]):
        if column not in row:
            fix = f"Columns of this row: {', '.join(row)}."
            raise ConfigError(f"There is no column {column!r}.", where=f"--slice, {source}", fix=fix)
        values[source] = str(row[column])
    return values


def _require_new(out: Path) -> None:
    from accord.errors import RunError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError("This directory is not empty.", where=str(out), fix="Choose another directory with --out.")
