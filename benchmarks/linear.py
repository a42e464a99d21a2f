"""Whether the cost of a step is linear in its unique tokens: DPO steps of 1 to 16 pairs, and a line through them.

    python benchmarks/linear.py --write

Every pair is a prompt of 113 and answers of 39 and 49 random tokens (the mean lengths of HH-RLHF harmless-base), so
n pairs are 201·n unique tokens. Sizes are taken in turn, several times, after one step of each that is not timed.
The last line is JSON; with --write, a plot goes to docs/images/linear.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.losses import LOSSES
from accord.models.load import load_policy
from accord.models.starter import STARTER
from accord.models.trees import Branch, Tree

SIZES = (1, 2, 4, 8, 16)
PROMPT, ANSWERS = 113, (39, 49)
IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "linear.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each size (default: 3)")
    parser.add_argument("--write", action="store_true", help="draw docs/images/linear.svg")
    options = parser.parse_args()
    seconds = _measure(options.repeats)
    tokens = [size * (PROMPT + sum(ANSWERS)) for size in SIZES]
    medians = [statistics.median(seconds[size]) for size in SIZES]
    slope, start = np.polyfit(tokens, medians, 1, w=1 / np.array(medians))
    explained = float(np.corrcoef(tokens, medians)[0, 1] ** 2)
    for count, size in zip(tokens, SIZES, strict=True):
        spread = f"{min(seconds[size]):.2f}-{max(seconds[size]):.2f}"
        print(f"{size:>3} pairs  {count:>5,} tokens  {statistics.median(seconds[size]):6.2f} s ({spread})")
    if options.write:
        _draw(tokens, seconds, float(slope), float(start))
    found = {"seconds_per_1000_tokens": round(1000 * float(slope), 3), "seconds_per_step": round(float(start), 3)}
    print(json.dumps({**found, "r_squared": round(explained, 5)}))


def _measure(repeats: int) -> dict[int, list[float]]:
    """Seconds of the timed steps by number of pairs."""
    engine = Engine(load_policy(STARTER, device=torch.device("cpu")), EngineConfig(), OptimizerConfig())
    bound, generator = LOSSES["dpo"].bind({}), np.random.default_rng(0)
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for number in range(repeats + 1):
        for size in SIZES:
            trees = [_tree(generator) for _ in range(size)]
            began = time.perf_counter()
            engine.forward_backward(trees, bound)
            engine.optim_step(1e-6)
            if number:
                seconds[size].append(time.perf_counter() - began)
    return seconds


def _tree(generator: np.random.Generator) -> Tree:
    def answer(length: int) -> Branch:
        reference = np.full(length, -3.0, np.float32)
        return Branch(generator.integers(5, 40_000, length), np.ones(length, bool), reference)

    return Tree(generator.integers(5, 40_000, PROMPT), tuple(answer(length) for length in ANSWERS), ranks=(0, 1))


def _draw(tokens: list[int], seconds: dict[int, list[float]], slope: float, start: float) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accord"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for count, size in zip(tokens, SIZES, strict=True):
        axes.plot([count] * len(seconds[size]), seconds[size], "o", color="tab:blue", markersize=4)
    axes.plot(tokens, [start + slope * count for count in tokens], color="tab:gray", linewidth=1)
    axes.set(xlabel="unique tokens of the step", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
