"""How long wrong answers grow under GRPO and under Dr.GRPO (Liu et al. 2025, figure 5).

    python benchmarks/evidence/length_bias.py --write

GRPO averages over each completion's own tokens, so a long wrong answer costs less per token than a short one, and it
divides by the standard deviation of the prompt's scores. Dr.GRPO does neither. Both start from the same model, which
solves 30 % of the numbers and writes 0 to 8 tildes after an answer. Prints the mean length of right and wrong answers
in the first and the last 20 steps. The last line is JSON; --write keeps it in baselines/ and draws
docs/images/length_bias.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from results import conclude, draw, smooth
from reversal import Numbers, beginner, lengths, train

_ENDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each (default: 300)")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    wrong, right, rewards, found = {}, {}, {}, []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seeds):
            root = Path(temporary) / str(seed)
            root.mkdir()
            model, prompts = beginner(root, seed), Numbers(seed).write(root / "prompts.jsonl")
            for recipe in ("grpo", "dr_grpo"):
                label = f"{recipe}, seed {seed}"
                metrics = train(recipe, model, prompts, root / recipe, {"steps": options.steps, "seed": seed})
                right_lengths, wrong_lengths = lengths(root / recipe, options.steps)
                rewards[label] = smooth([step["reward"] for step in metrics])
                right[label], wrong[label] = smooth(right_lengths), smooth(wrong_lengths)
                ends = {"right": right_lengths, "wrong": wrong_lengths}
                row = {
                    f"{name}, {place}": round(float(np.nanmean(values[part])), 2)
                    for name, values in ends.items()
                    for place, part in (("first", slice(_ENDS)), ("last", slice(-_ENDS, None)))
                }
                found.append({"recipe": recipe, "seed": seed, **row, "pass@1": round(rewards[label][-1], 3)})
                print(json.dumps(found[-1]), flush=True)
    if options.write:
        draw("length_bias", {"tokens of wrong answers": wrong, "tokens of right answers": right, "pass@1": rewards})
    conclude("length_bias", {"runs": found}, write=options.write)


if __name__ == "__main__":
    main()
