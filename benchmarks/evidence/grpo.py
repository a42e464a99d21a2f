"""GRPO teaches a small model to reverse numbers: from three tenths to nine tenths, for several seeds.

    python benchmarks/evidence/grpo.py --seeds 3 --write

A model of 0.3 million weights is trained from scratch on demonstrations until it solves 30 % of 500 held-out numbers,
then by `accord train grpo` on the 9,500 others with the reward `exact_answer`. Prints pass@1 and pass@8 of the held-out
numbers before and after, and minutes; exits with 1 if a seed stays under 0.9. The last line is JSON; --write keeps it
in baselines/ and draws docs/images/grpo.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from results import conclude, draw, smooth
from reversal import Numbers, answers, beginner, train

from accord.models.load import load_policy

BAR = 0.9
SCHEDULE = {"optimizer.schedule": "linear"}
"""The recipe's learning rate stays as it is, and its noise with it: too much for a rate that is large enough here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--steps", type=int, default=600, help="of GRPO (default: 600)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    found, rewards, idle, entropy = [], {}, {}, {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            row, metrics = _one(Path(temporary), seed, options.steps)
        found.append({"seed": seed, **row})
        print(json.dumps(found[-1]), flush=True)
        rewards[f"seed {seed}"] = [smooth([step["reward"] for step in metrics])]
        idle[f"seed {seed}"] = [smooth([step["frac_reward_zero_std"] for step in metrics])]
        entropy[f"seed {seed}"] = [smooth([step.get("entropy", float("nan")) for step in metrics])]
    if options.write:
        draw("grpo", {"pass@1 in training": rewards, "prompts without an advantage": idle, "entropy": entropy})
    conclude("grpo", {"seeds": found}, write=options.write)
    sys.exit(any(row["pass@1 after"] < BAR for row in found))


def _one(directory: Path, seed: int, steps: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    numbers, began = Numbers(seed), _processor_minutes()
    model = beginner(directory, seed)
    taught = _processor_minutes()
    settings = {"steps": steps, "seed": seed, **SCHEDULE}
    metrics = train("grpo", model, numbers.write(directory / "prompts.jsonl"), directory / "run", settings)
    done = _processor_minutes()
    scores = {}
    for name, path in (("before", model), ("after", directory / "run" / "model")):
        right = answers(load_policy(str(path), device=torch.device("cpu")), numbers.held_out, 8, seed=1)
        scores |= {f"pass@1 {name}": float(right.mean()), f"pass@8 {name}": float(right.any(1).mean())}
    wall = sum(step["seconds"] for step in metrics) / 60
    minutes = {"SFT minutes": taught - began, "GRPO minutes": done - taught, "GRPO minutes by the clock": wall}
    return {name: round(value, 3) for name, value in (scores | minutes).items()}, metrics


def _processor_minutes() -> float:
    """Of this process and those that it has started: others may be using the machine."""
    times = os.times()
    return (times.user + times.system + times.children_user + times.children_system) / 60


if __name__ == "__main__":
    main()
