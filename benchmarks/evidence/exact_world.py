"""How near PPO, GRPO, RLOO and DPO come to the best policy, in a language whose 4,096 strings are enumerated.

    python benchmarks/evidence/exact_world.py --write

What tests/invariant/test_exact_world.py asserts in seconds, with more samples and steps: total variation to
π* ∝ π_ref·exp(r/β), and reward over KL beside the most reward that any policy can have at that KL. Exits with 1 if a
method ends farther from its fixed point than 0.02, or is above the frontier. The last line is JSON; --write keeps it in
baselines/ and draws docs/images/exact_world.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from results import ROOT, conclude, plotting, save

sys.path.insert(0, str(ROOT / "tests" / "invariant"))

from enumerated import Point, World, distance, methods, online, preferences, rankings

BOUND = 0.02
PLANS = {
    "rloo": (150, 1024, 0.01),
    "ppo": (250, 1536, 0.01),
    "grpo": (300, 16_384, 0.005),
    "grpo_letterwise": (300, 12_288, 0.005),
    "grpo_rescaled": (300, 12_288, 0.005),
}
"""Steps, samples of each, and the learning rate. Methods whose noise stays at the fixed point need more samples."""
RANKINGS = (2, 16, 128, 1024, 38_400)
"""Of 63 strings: 1,953 pairs each."""
_RANKINGS_RATE = 0.005
_BATCH, _LEAST_STEPS = 32, 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps and samples, to try it (default: 1)")
    parser.add_argument("--only", nargs="*", help="names of methods (default: all, and dpo)")
    parser.add_argument("--processes", type=int, default=2, help="methods at once, a thread each (default: 2)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    names = options.only or [_dpo(RANKINGS[-1]), *PLANS, *map(_dpo, RANKINGS[:-1])]
    points, rows = {}, {}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for name, found in zip(names, pool.map(partial(_run, share=options.share), names), strict=True):
            points[name], rows[name] = found
            print(name, json.dumps(rows[name]), flush=True)
    if options.write:
        _draw(points)
    far = [name for name, row in rows.items() if _ends_at_home(name) and row["distance to its fixed point"] > BOUND]
    above = [name for name, row in rows.items() if row["above the frontier"] > 1e-9]
    result = {"methods": rows, "farther than 0.02": far, "above the frontier": above}
    conclude("exact_world", result, write=options.write)
    sys.exit(bool(far or above))


def _run(name: str, share: float) -> tuple[list[Point], dict[str, float]]:
    """One method in a process of its own."""
    torch.set_num_threads(1)  # threads cost more than they bring for a model of this size
    with tempfile.TemporaryDirectory() as temporary:
        world = World(Path(temporary) / "model")
        began = time.process_time()
        if name in PLANS:
            *sizes, rate = PLANS[name]
            steps, samples = (max(8, int(share * size)) for size in sizes)
            points = online(world, methods(world.beta)[name], steps=steps, samples=samples, learning_rate=rate)
        else:
            count = max(2, int(share * next(count for count in RANKINGS if _dpo(count) == name)))
            steps = max(int(share * _LEAST_STEPS), count // _BATCH)
            trees = rankings(world, count)
            points = preferences(world, trees, steps=steps, learning_rate=_RANKINGS_RATE, batch=_BATCH)
        return points, _row(world, name, points, time.process_time() - began)


def _dpo(count: int) -> str:
    return f"dpo, {count * 1953:,} pairs"


def _ends_at_home(name: str) -> bool:
    """Whether a method is held to the bound: few pairs are not enough."""
    return name in PLANS or name == _dpo(RANKINGS[-1])


def _row(world: World, name: str, points: Sequence[Point], seconds: float) -> dict[str, float]:
    last = points[-1]
    homes = {"grpo_letterwise": world.letterwise, "grpo_rescaled": world.rescaled}
    home = homes[name]() if name in homes else world.optimum_S
    row = {
        "distance": last.distance,
        "distance to its fixed point": distance(last.logp_S, home),
        "reward": last.reward,
        "kl": last.kl,
        "most reward at this KL": last.most,
        "above the frontier": max(point.reward - point.most for point in points),
        "processor seconds": seconds,
    }
    return {key: round(value, 5) for key, value in row.items()}


def _draw(points: dict[str, list[Point]]) -> None:
    plt = plotting()
    with tempfile.TemporaryDirectory() as temporary:
        world = World(Path(temporary) / "model")
    figure, (near, plane) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, run in points.items():
        done = [point.step / run[-1].step for point in run]
        near.plot(done, [point.distance for point in run], linewidth=1.2)
        plane.plot([point.kl for point in run], [point.reward for point in run], label=name, linewidth=1.2)
    near.axhline(BOUND, color="tab:gray", linewidth=0.8, linestyle=":")
    near.set(xlabel="share of the run", ylabel="total variation to the best policy", yscale="log")
    plane.legend(loc="lower right", frameon=False, fontsize=6)
    edge = [world.point_of(world.tilted(temperature)) for temperature in np.geomspace(0.3, 100, 60)]
    most = max((point.kl for run in points.values() for point in run), default=1.0)
    edge = [point for point in edge if point.kl <= 1.1 * most]
    plane.plot([point.kl for point in edge], [point.reward for point in edge], color="black", linewidth=1)
    best = world.point_of(world.optimum_S)
    plane.plot(best.kl, best.reward, "k*")
    plane.set(xlabel="KL to the reference (nats)", ylabel="reward")
    save(figure, "exact_world")


if __name__ == "__main__":
    main()
