"""`accord evaluate compare|reward`: is the new model better than its baseline, and how good is a reward model?"""

from __future__ import annotations

from pathlib import Path

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
    prompts = load(data, "prompts", limit).records

    from accord.evaluate.answers import answer, answer_trees, divergences, paired_outcomes, scores
    from accord.evaluate.compare import compare as reduce
    from accord.evaluate.report import Report, write_report
    from accord.evaluate.report.record import summary
    from accord.models.load import load_policy, load_reward_model
    from accord.sampling.request import SamplingConfig

    config = SamplingConfig.build(parse_assignments(set), where="--set")
    old = load_policy(baseline)
    before = answer(old, prompts, config, seed, "Answers before")
    new = load_policy(model)
    after = answer(new, prompts, config, seed, "Answers after")
    measured = config.temperature == 1.0 and config.top_p == 1.0 and config.top_k == 0
    kl = divergences(old, prompts, after, "KL from baseline") if measured else None
    rewards = None
    if reward_model is not None:
        judge = load_reward_model(reward_model)
        both = [scores(judge, answer_trees(old, prompts, answers), "Rewards") for answers in (before, after)]
        rewards = [(first[0], second[0]) for first, second in zip(*both, strict=True)]
    result = reduce(paired_outcomes(prompts, before, after, rewards=rewards, divergence=kl))
    reasons = {
        "reward": "" if rewards else "no --reward-model was given",
        "kl": "" if measured else "answers were not sampled at temperature 1 from the whole distribution",
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


def reward(*, model: str, data: str, out: Path, limit: int | None = None) -> None:
    """Accuracy of a reward model on preference pairs or rankings it has not seen.

    Parameters
    ----------
    model
        A reward model: hub id or directory.
    data
        Preference pairs or rankings.
    out
        Directory of reward.json; must be new.
    limit
        Use this many rows only.
    """
    from accord.data.load import load

    _require_new(out)
    loaded = load(data, "preferences", limit)
    print(loaded.summary())

    import json
    from dataclasses import asdict

    from accord.evaluate.answers import scores
    from accord.evaluate.reward import evaluate_rewards
    from accord.files import write_text
    from accord.models.load import load_reward_model
    from accord.models.render import Renderer

    network = load_reward_model(model)
    renderer = Renderer(network)
    trees = [renderer.tree(record) for record in loaded.records]
    rewards = scores(network, trees, "Reward accuracy")
    pairs = [(tree, row, *pair) for tree, row in zip(trees, rewards, strict=True) for pair in tree.pairs]
    report = evaluate_rewards(
        [row[better] for _, row, better, _ in pairs],
        [row[worse] for _, row, _, worse in pairs],
        chosen_lengths=[len(tree.branches[better].tokens_L) for tree, _, better, _ in pairs],
        rejected_lengths=[len(tree.branches[worse].tokens_L) for tree, _, _, worse in pairs],
    )
    write_text(out / "reward.json", json.dumps({"model": model, "data": data, **asdict(report)}, indent=2) + "\n")
    accuracy, longer = report.accuracy, report.longer_wins
    interval = f"{accuracy.interval.low:.3f} to {accuracy.interval.high:.3f}"
    print(f"accuracy {accuracy.value:.3f} (95 % interval {interval}, n = {accuracy.n:,})")
    if longer is not None:
        print(f"longer wins {longer.value:.3f}")
    print(
        f"log-loss {report.log_loss:.3f}, Brier {report.brier:.3f}, mean margin {report.margin:.3f}: {out}/reward.json"
    )


def _require_new(out: Path) -> None:
    from accord.errors import RunError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError("This directory is not empty.", where=str(out), fix="Choose another directory with --out.")
