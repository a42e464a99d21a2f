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

RECIPES = ("grpo", "dr_grpo")
_ENDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each run (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    curves: dict[str, dict[str, list[list[float]]]] = {
        quantity: {recipe: [] for recipe in RECIPES}
        for quantity in ("tokens of wrong answers", "tokens of right answers", "pass@1 in training")
    }
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            model, prompts = beginner(root, seed), Numbers(seed).write(root / "prompts.jsonl")
            for recipe in RECIPES:
                metrics = train(recipe, model, prompts, root / recipe, {"steps": options.steps, "seed": seed})
                right, wrong = lengths(root / recipe, options.steps)
                solved = [step["reward"] for step in metrics]
                for quantity, values in zip(curves, (wrong, right, solved), strict=True):
                    curves[quantity][recipe].append(smooth(values))
                row = {
                    f"{name}, {place}": round(float(np.nanmean(values[part])), 3)
                    for name, values in {"wrong": wrong, "right": right, "pass@1": solved}.items()
                    for place, part in (("first", slice(_ENDS)), ("last", slice(-_ENDS, None)))
                }
                found.append({"recipe": recipe, "seed": seed, **row})
                print(json.dumps(found[-1]), flush=True)
    if options.write:
        draw("length_bias", curves)
    conclude("length_bias", {"runs": found}, write=options.write)


if __name__ == "__main__":
    main()
