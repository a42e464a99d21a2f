"""How long wrong answers grow under GRPO and under Dr.GRPO (Liu et al. 2025, figure 5).

    python benchmarks/evidence/length_bias.py --write

GRPO averages over each completion's own tokens, so that a wrong answer of many tokens is worth −|A|/length: the longer,
the better. Of right answers the shorter are better. Dr.GRPO has one denominator for all. For that to move anything the
model must know when it is wrong, and go on to be wrong. So here it guesses: of the answers 1 to 4 one is always right,
and a KL to the start, at which each is as probable, keeps it wrong every third time or so. After the answer come 0
to 8 tildes, which earn nothing. Under a KL the lengths end where the bias and the KL are equal; without the bias they
stay what they were. Prints the mean length of right and wrong answers in the first and the last 20 steps. The last line
is JSON; --write keeps it in baselines/ and draws docs/images/length_bias.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from guesses import guesser, questions
from results import conclude, draw, smooth
from reversal import lengths, train

RIGHT = 1
RECIPES = {"grpo": 1.0, "dr_grpo": 0.5}
"""And the weight of the KL. The scores of GRPO are divided by their standard deviation, of about a half."""
_ENDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    curves: dict[str, dict[str, list[list[float]]]] = {
        quantity: {recipe: [] for recipe in RECIPES}
        for quantity in ("tokens of wrong answers", "tokens of right answers", "share of right answers")
    }
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            model, prompts = guesser(root, seed), questions(root / "prompts.jsonl", [RIGHT] * 1000)
            for recipe, weight in RECIPES.items():
                settings = {"steps": options.steps, "seed": seed, "loss.kl_coefficient": weight}
                metrics = train(recipe, model, prompts, root / recipe, settings)
                right, wrong = lengths(root / recipe, options.steps)
                for quantity, values in zip(curves, (wrong, right, [step["reward"] for step in metrics]), strict=True):
                    curves[quantity][recipe].append(smooth(values))
                row = {
                    f"{name}, {place}": round(float(np.nanmean(values[part])), 2)
                    for name, values in {"wrong": wrong, "right": right}.items()
                    for place, part in (("first", slice(_ENDS)), ("last", slice(-_ENDS, None)))
                }
                share = round(float(np.mean([step["reward"] for step in metrics[-_ENDS:]])), 3)
                found.append({"recipe": recipe, "seed": seed, **row, "share of right": share})
                print(json.dumps(found[-1]), flush=True)
    if options.write:
        draw("length_bias", curves)
    conclude("length_bias", {"runs": found}, write=options.write)


if __name__ == "__main__":
    main()
