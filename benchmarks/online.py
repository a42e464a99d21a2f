"""Online training of `starter` by Accord and by TRL 1.16 on what it samples to the same prompts, side by side.

    python benchmarks/online.py --tasks grpo,rloo,ppo --steps 4 --rounds 1 --write

A step takes 8 prompts of `hh_harmless/train.jsonl.gz`, samples 4 completions of each of up to 48 tokens (temperature 1,
until the stop token), rewards them by the same rule (how near the text comes to 150 characters), and makes one update
of all weights, float32 with bfloat16 autocast, with the same AdamW. Every side runs in a process of its own, in turn;
the run fails if the two did not sample from the same prompts at every step. What is sampled differs: each side has its
own random numbers, and the tokens of both are reported.

The first two steps are not timed. The ratio is TRL's median step over Accord's; memory is Accord's peak over TRL's. TRL
1.16 has no PPO: of it, and of all others, the shares of sampling, rewards, values and reference (forward), and updates
(backward) in a step of Accord are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from accord.models.load import load_tokenizer
from accord.models.starter import STARTER
from offline import DATA, Side, alternate, positive, require_peer
from offline_plan import WARMUP
from offline_report import ACCORD, BEST, Run, baseline, circumstances, fallen_ratios
from online_plan import SOURCE, TASKS, OnlinePlan, Task, make_online_plan

BASELINES = Path(__file__).resolve().parent / "baselines"
_SIDES = (
    Side(ACCORD, ("online_accord.py",), keep_memory=False),
    Side(BEST, ("online_trl.py",), keep_memory=True),
)


def main() -> None:
    options = _options()
    if set(options.tasks) != {"ppo"}:
        require_peer()
    if not (DATA / SOURCE).is_file():
        raise SystemExit(
            f"This benchmark needs {os.path.relpath(DATA / SOURCE)}, which is not there: see benchmarks/README.md."
        )
    tokenizer = load_tokenizer(STARTER)
    results: dict[str, Any] = {}
    for task in options.tasks:
        plan = make_online_plan(task, DATA / SOURCE, tokenizer, options.steps)
        results[task] = _summary(plan, alternate(plan, _SIDES[: 1 if task == "ppo" else 2], options.rounds))
        _show(results[task])
    last, path = _answer(results), baseline(BASELINES, "online")
    if options.write:
        path.parent.mkdir(exist_ok=True)
        found = {**circumstances("online.py", "trl"), "rounds": options.rounds, **last, "tasks": results}
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"Written: {os.path.relpath(path)}")
    slower = [] if options.write else fallen_ratios(last["ratio"], path)
    print(json.dumps(last))
    if slower:
        raise SystemExit("Under 80 % of the baseline: " + ", ".join(slower))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=_tasks, default=TASKS, help=f"of {','.join(TASKS)} (default: all)")
    parser.add_argument("--steps", type=positive, default=4, help="counted steps, after 2 of warm-up (default: 4)")
    parser.add_argument("--rounds", type=positive, default=1, help="how often every side runs, in turn (default: 1)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/baselines/online-<cpu>.json")
    return parser.parse_args()


def _tasks(text: str) -> tuple[Task, ...]:
    names = text.split(",")
    if not set(names) <= set(TASKS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(TASKS)}")
    return tuple(task for task in TASKS if task in names)


def _summary(plan: OnlinePlan, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Everything that is reported of one task."""
    ours = runs[ACCORD]
    return {
        "task": plan.task,
        "steps": plan.steps - WARMUP,
        "prompts_left_out": plan.left_out,
        "sides": {name: _side(side, ours) for name, side in runs.items()},
    }


def _side(runs: list[Run], ours: list[Run]) -> dict[str, Any]:
    counted = [second for run in runs for second in run.seconds[WARMUP:]]
    tokens = [count for run in runs for count in run.tokens[WARMUP:]]
    by_round = [_median(theirs) / _median(own) for theirs, own in zip(runs, ours, strict=True)]
    shares = [run.shares for run in runs if run.shares]
    return {
        "seconds_per_step": {"median": statistics.median(counted), "min": min(counted), "max": max(counted)},
        "sampled_tokens_per_step": statistics.mean(tokens),
        "peak_memory_gb": max(run.peak_memory for run in runs) / 1e9,
        "ratio": statistics.median(counted) / statistics.median(s for run in ours for s in run.seconds[WARMUP:]),
        "ratio_by_round": by_round,
        "shares": {name: statistics.mean(each[name] for each in shares) for name in shares[0]} if shares else None,
        "steps": [{"seconds": run.seconds, "tokens": run.tokens} for run in runs],
        "other_load": max(run.other_load for run in runs),
    }


def _median(run: Run) -> float:
    return statistics.median(run.seconds[WARMUP:])


def _show(result: dict[str, Any]) -> None:
    """Print the table of one task."""
    print(f"\n{result['task']}: {result['steps']} steps; prompts too long, left out: {result['prompts_left_out']}")
    print(f"{'':20}{'s/step median (min-max)':>26}{'sampled tok/step':>18}{'peak GB':>9}{'ratio (by round)':>22}")
    for name, side in result["sides"].items():
        times, rounds = side["seconds_per_step"], side["ratio_by_round"]
        spread = f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})"
        ratio = f"{side['ratio']:.2f} ({min(rounds):.2f}-{max(rounds):.2f})" if name != ACCORD else ""
        print(
            f"{name:20}{spread:>26}{side['sampled_tokens_per_step']:>18,.0f}{side['peak_memory_gb']:>9.1f}{ratio:>22}"
        )
    shares = result["sides"][ACCORD]["shares"]
    print("Accord's step: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    busiest = max(side["other_load"] for side in result["sides"].values())
    if busiest > 0.05:
        print(f"Others used up to {busiest:.0%} of the processor meanwhile: do not trust these times.")
    print(flush=True)


def _answer(results: dict[str, Any]) -> dict[str, Any]:
    """The last line of the output."""
    sides = {task: result["sides"] for task, result in results.items()}
    memory = {
        task: round(of[ACCORD]["peak_memory_gb"] / of[BEST]["peak_memory_gb"], 3)
        for task, of in sides.items()
        if BEST in of
    }
    return {
        "ratio": {task: round(of[BEST]["ratio"], 2) for task, of in sides.items() if BEST in of},
        "memory": memory,
        "seconds": {task: round(of[ACCORD]["seconds_per_step"]["median"], 2) for task, of in sides.items()},
        "shares": {
            task: {name: round(share, 3) for name, share in of[ACCORD]["shares"].items()} for task, of in sides.items()
        },
    }


if __name__ == "__main__":
    main()
