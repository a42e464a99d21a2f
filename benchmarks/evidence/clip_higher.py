"""What the upper clip does to entropy: 1.2 as in PPO, 1.28 as in DAPO (Yu et al. 2025, figure 2), and around them.

    python benchmarks/evidence/clip_higher.py --write

Eight updates of every batch. A rare token meets the clips, a likely one does not: its ratio cannot go far. In a batch
that likes it by chance it rises by log(1 + clip_high) at most, in one that does not it falls by -log(1 - clip_low). So
chance alone drives rare tokens out where clip_high < 1 / (1 - clip_low) - 1 = 0.25, and feeds them where it is larger.
To see chance alone, nothing can be learned here: the model guesses one of four answers, and which one is right was
drawn for every prompt. Prints the entropy of the first step and of the last 20, and the share of clipped tokens. The
last line is JSON; --write keeps it in baselines/ and draws docs/images/clip_higher.svg.
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
from guesses import ANSWERS, guesser, questions
from results import conclude, draw, smooth
from reversal import train

CLIPS = (0.1, 0.2, 0.28, 0.4)
UPDATES = {"rollout.epochs": 8, "optimizer.learning_rate": 3e-4}
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
        names = {"entropy": "entropy", "clip_ratio/high_mean": "share of tokens above the clip"}
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
        root = Path(temporary)
        drawn = np.random.default_rng(seed).integers(1, ANSWERS + 1, 10_000).tolist()
        model, prompts = guesser(root, seed), questions(root / "prompts.jsonl", drawn)
        for clip in CLIPS:
            out = root / f"clip-{clip}"
            settings = {"steps": steps, "seed": seed, "loss.clip_high": clip, **UPDATES}
            metrics = train("dr_grpo", model, prompts, out, settings)
            row = {
                name: round(float(np.nanmean([step.get(name, float("nan")) for step in metrics[-_ENDS:]])), 4)
                for name in ("entropy", "clip_ratio/high_mean", "clip_ratio/low_mean")
            }
            found[clip] = {"entropy at first": round(metrics[0]["entropy"], 4), **row}, metrics
            print(clip, seed, json.dumps(found[clip][0]), flush=True)
    return found


if __name__ == "__main__":
    main()
