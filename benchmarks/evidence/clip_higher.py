"""What the upper clip does to entropy: 1.2 as in PPO, 1.28 as in DAPO (Yu et al. 2025, figure 2), and around them.

    python benchmarks/evidence/clip_higher.py --write

A ratio above the clip has no gradient, and only a token that was rare can have one: the clip holds back what is rare.
Eight updates of every batch, so that ratios move and the clip counts; all else is Dr.GRPO, which is indifferent to
length, so that the number of tildes after an answer, which earns nothing, is free to keep its entropy or to lose it.
Prints entropy and the share of clipped tokens of the last 20 steps, and pass@1 of the held-out numbers. The last line
is JSON; --write keeps it in baselines/ and draws docs/images/clip_higher.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from results import conclude, draw, smooth
from reversal import Numbers, beginner, solved, train

from accord.models.load import load_policy

CLIPS = (0.1, 0.2, 0.28, 0.4)
UPDATES = {"rollout.mini_batches": 4, "rollout.epochs": 2, "optimizer.learning_rate": 2e-4}
_ENDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: 60)")
    parser.add_argument("--seeds", type=int, default=2, help="how many, side by side (default: 2)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.seeds, get_context("spawn")) as pool:
        seeds = list(pool.map(partial(_of_seed, steps=options.steps), range(options.seeds)))
    if options.write:
        names = {"entropy": "entropy", "reward": "pass@1 in training"}
        panels = {
            quantity: {
                f"clip_high = {clip}": [smooth([step.get(name, float("nan")) for step in of[clip][1]]) for of in seeds]
                for clip in CLIPS
            }
            for name, quantity in names.items()
        }
        draw("clip_higher", panels)
    found = [{"clip_high": clip, "seed": seed, **of[clip][0]} for seed, of in enumerate(seeds) for clip in CLIPS]
    conclude("clip_higher", {"runs": found}, write=options.write)


def _of_seed(seed: int, steps: int) -> dict[float, tuple[dict[str, float], list[dict[str, float]]]]:
    """What every clip comes to, and its metrics step by step."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        root, numbers = Path(temporary), Numbers(seed)
        model, prompts = beginner(root, seed), numbers.write(root / "prompts.jsonl")
        for clip in CLIPS:
            out = root / f"clip-{clip}"
            settings = {"steps": steps, "seed": seed, "loss.clip_high": clip, **UPDATES}
            metrics = train("dr_grpo", model, prompts, out, settings)
            row = {
                name: round(float(np.nanmean([step.get(name, float("nan")) for step in metrics[-_ENDS:]])), 4)
                for name in ("entropy", "clip_ratio/high_mean", "clip_ratio/low_mean")
            }
            trained = load_policy(str(out / "model"), device=torch.device("cpu"))
            found[clip] = {**row, "pass@1": round(solved(trained, numbers.held_out, 8, seed=1), 3)}, metrics
            print(clip, seed, json.dumps(found[clip][0]), flush=True)
    return found


if __name__ == "__main__":
    main()
