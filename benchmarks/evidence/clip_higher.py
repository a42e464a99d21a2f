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
from pathlib import Path

import numpy as np
import torch
from results import conclude, draw, smooth
from reversal import Numbers, beginner, solved, train

from accord.models.load import load_policy

CLIPS = (0.1, 0.2, 0.28, 0.4)
UPDATES = {"rollout.mini_batches": 4, "rollout.epochs": 2}
_ENDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each run (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    labels, found = [f"clip_high = {clip}" for clip in CLIPS], []
    entropy: dict[str, list[list[float]]] = {label: [] for label in labels}
    rewards: dict[str, list[list[float]]] = {label: [] for label in labels}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            root, numbers = Path(temporary), Numbers(seed)
            model, prompts = beginner(root, seed), numbers.write(root / "prompts.jsonl")
            for clip, label in zip(CLIPS, labels, strict=True):
                settings = {"steps": options.steps, "seed": seed, "loss.clip_high": clip, **UPDATES}
                metrics = train("dr_grpo", model, prompts, root / f"clip-{clip}", settings)
                trained = load_policy(str(root / f"clip-{clip}" / "model"), device=torch.device("cpu"))
                last = {
                    name: round(float(np.nanmean([step.get(name, float("nan")) for step in metrics[-_ENDS:]])), 4)
                    for name in ("entropy", "clip_ratio/high_mean", "clip_ratio/low_mean")
                }
                passed = round(solved(trained, numbers.held_out, 8, seed=1), 3)
                found.append({"clip_high": clip, "seed": seed, **last, "pass@1": passed})
                print(json.dumps(found[-1]), flush=True)
                entropy[label].append(smooth([step.get("entropy", float("nan")) for step in metrics]))
                rewards[label].append(smooth([step["reward"] for step in metrics]))
    if options.write:
        draw("clip_higher", {"entropy": entropy, "pass@1 in training": rewards})
    conclude("clip_higher", {"runs": found}, write=options.write)


if __name__ == "__main__":
    main()
