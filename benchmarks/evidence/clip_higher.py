"""What the upper clip does to entropy: 1.2 as in PPO, 1.28 as in DAPO (Yu et al. 2025, figure 2).

    python benchmarks/evidence/clip_higher.py --write

Four updates of every batch, so that ratios move and the clip counts; all else is GRPO. Prints entropy, pass@1
and the share of clipped tokens of the last 20 steps. The last line is JSON; --write keeps it in baselines/ and draws
docs/images/clip_higher.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from results import conclude, draw, smooth
from reversal import Numbers, beginner, train

CLIPS = (0.1, 0.2, 0.28, 0.4)
_ENDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of all (default: 0)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    entropy, rewards, found = {}, {}, []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, prompts = beginner(root, options.seed), Numbers(options.seed).write(root / "prompts.jsonl")
        for clip in CLIPS:
            settings = {"steps": options.steps, "loss.clip_high": clip, "rollout.mini_batches": 4}
            metrics = train("grpo", model, prompts, root / f"clip-{clip}", settings)
            label = f"clip_high = {clip}"
            entropy[label] = smooth([step.get("entropy", float("nan")) for step in metrics])
            rewards[label] = smooth([step["reward"] for step in metrics])
            last = {
                name: round(float(np.nanmean([step.get(name, float("nan")) for step in metrics[-_ENDS:]])), 4)
                for name in ("entropy", "reward", "clip_ratio/high_mean", "clip_ratio/low_mean")
            }
            found.append({"clip_high": clip, **last})
            print(json.dumps(found[-1]), flush=True)
    if options.write:
        draw("clip_higher", {"entropy": entropy, "pass@1 in training": rewards})
    conclude("clip_higher", {"runs": found}, write=options.write)


if __name__ == "__main__":
    main()
