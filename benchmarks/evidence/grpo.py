"""GRPO teaches a small model to reverse numbers: from three tenths to nine tenths, for several seeds.

    python benchmarks/evidence/grpo.py --seeds 3 --write

A model of 0.3 million weights is trained from scratch on demonstrations until it solves 30 % of 500 held-out numbers,
then by `accord train grpo` on the 9,500 others with the reward `exact_answer`. Prints pass@1 and pass@8 of the held-out
numbers before and after, and minutes; the last line is JSON. --write draws docs/images/grpo.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from reversal import Numbers, answers, beginner, draw, smooth, train

from accord.models.load import load_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--steps", type=int, default=300, help="of GRPO (default: 300)")
    parser.add_argument("--out", type=Path, help="where the runs are kept (default: nowhere)")
    parser.add_argument("--write", action="store_true", help="draw the curves into docs/images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.out or Path(temporary)
        results, rewards, idle, entropy = [], {}, {}, {}
        for seed in range(options.seeds):
            found, metrics = _one(root / str(seed), seed, options.steps)
            results.append(found)
            print(json.dumps(found), flush=True)
            rewards[f"seed {seed}"] = smooth([step["reward"] for step in metrics])
            idle[f"seed {seed}"] = smooth([step["frac_reward_zero_std"] for step in metrics])
            entropy[f"seed {seed}"] = smooth([step.get("entropy", float("nan")) for step in metrics])
    if options.write:
        draw("grpo", {"pass@1 in training": rewards, "groups without an advantage": idle, "entropy": entropy})
    print(json.dumps({"seeds": results}))


def _one(directory: Path, seed: int, steps: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    directory.mkdir(parents=True)
    numbers, began = Numbers(seed), time.perf_counter()
    model = beginner(directory, seed)
    taught = time.perf_counter()
    metrics = train("grpo", model, numbers.write(directory / "prompts.jsonl"), directory / "run", {"steps": steps})
    done = time.perf_counter()
    scores = {}
    for name, path in (("before", model), ("after", directory / "run" / "model")):
        right = answers(load_policy(str(path), device=torch.device("cpu")), numbers.held_out, 8, seed=1)
        scores |= {f"pass@1 {name}": float(right.mean()), f"pass@8 {name}": float(right.any(1).mean())}
    minutes = {"SFT minutes": (taught - began) / 60, "GRPO minutes": (done - taught) / 60}
    return {name: round(value, 3) for name, value in (scores | minutes).items()}, metrics


if __name__ == "__main__":
    main()
