"""Learning from what an older policy has sampled: 0 to 8 steps old, with and without importance weights.

    python benchmarks/evidence/staleness.py --write

`truncated` is Accord's own way with `rollout.max_staleness`: every token weighs min(π/μ, 2), where μ has sampled it.
`clip` is its `importance_cap = 0`: the loss's clipped ratio is taken to μ. `none` is what Accord refuses, REINFORCE
that takes stale completions for its own; here a sampler hides their age. Nothing is divided by standard deviations.
Prints pass@1 of the held-out numbers after training and the effective sample size of the last 20 steps. The last line
is JSON; --write keeps it in baselines/ and draws docs/images/staleness.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from results import conclude, draw
from reversal import SETTINGS, Numbers, beginner, metrics_of, solved, train
from torch import Tensor

from accord.models.load import load_policy
from accord.models.network import Policy
from accord.models.render import Renderer
from accord.rewards import Rewards
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.sampler import OnFinish
from accord.train import Run, encode_prompts, provenance, resolve_online, train_online
from accord.types import Completion, Prompt

AGES = (0, 1, 2, 4, 8)
CORRECTIONS = ("none", "clip", "truncated")
_ENDS = 20


class OldSampler:
    """Samples from the weights that it was given `age` loads ago; from the oldest ones while there are fewer."""

    def __init__(self, policy: Policy, age: int) -> None:
        self.local = LocalSampler(policy, "float32")
        self.kept: deque[dict[str, Tensor]] = deque(maxlen=age + 1)

    @property
    def policy_version(self) -> int:
        return self.local.policy_version

    @property
    def weights_hash(self) -> str:
        return self.local.weights_hash

    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        state = policy.state() if state is None else state
        self.kept.append({name: tensor.clone() for name, tensor in state.items()})
        self.local.policy.model.load_state_dict(self.kept[0])
        self.local.policy_version = version

    def sample(
        self, requests: Sequence[Request], config: SamplingConfig, *, on_finish: OnFinish | None = None
    ) -> list[Completion]:
        return self.local.sample(requests, config, on_finish=on_finish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="of each of a seed's 13 runs (default: 80)")
    parser.add_argument("--seeds", type=int, default=2, help="how many, side by side (default: 2)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.seeds, get_context("spawn")) as pool:
        seeds = list(pool.map(partial(_of_seed, steps=options.steps), range(options.seeds)))
    if options.write:
        panels = {
            quantity: {name: [[row[quantity] for row in rows[name]] for rows in seeds] for name in CORRECTIONS}
            for quantity in ("pass@1", "sample size")
        }
        draw("staleness", panels, across="age in steps", places=AGES)
    found = [
        {"correction": name, "age": age, "seed": seed, **row}
        for seed, rows in enumerate(seeds)
        for name in CORRECTIONS
        for age, row in zip(AGES, rows[name], strict=True)
    ]
    conclude("staleness", {"runs": found}, write=options.write)


def _of_seed(seed: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """What every correction comes to at every age; at age 0 there is nothing to correct."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = beginner(root, seed)

        def row(name: str, age: int) -> dict[str, float]:
            found = _row(root / f"{name}-{age}", model, name, age, steps, seed)
            print(name, age, seed, json.dumps(found), flush=True)
            return found

        fresh = row("truncated", 0)
        return {name: [fresh, *(row(name, age) for age in AGES[1:])] for name in CORRECTIONS}


def _row(out: Path, model: Path, correction: str, age: int, steps: int, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    numbers = Numbers(seed)
    settings = {"steps": steps, "seed": seed, "advantage.scale": "none"}
    if correction == "none":
        _uncorrected(out, model, numbers, settings, age)
    else:
        settings |= {"rollout.max_staleness": age} if age else {}
        settings |= {"rollout.importance_cap": 0} if age and correction == "clip" else {}
        train("grpo", model, numbers.write(out.with_suffix(".jsonl")), out, settings)
    metrics = metrics_of(out)
    trained = load_policy(str(out / "model"), device=torch.device("cpu"))
    row = {
        "pass@1": solved(trained, numbers.held_out, 8, seed=1),
        "sample size": np.nanmean([_sample_size(step) for step in metrics[-_ENDS:]]),
    }
    return {name: round(float(value), 3) for name, value in row.items()}


def _sample_size(step: Mapping[str, float]) -> float:
    """Where tokens are weighted, that of the weights; else that of the loss's ratio."""
    return step.get("sampling/effective_sample_size", step.get("effective_sample_size", float("nan")))


def _uncorrected(out: Path, model: Path, numbers: Numbers, settings: Mapping[str, object], age: int) -> None:
    assignments = [f"{name}={json.dumps(value)}" for name, value in {**SETTINGS, **settings}.items()]
    extra = {"loss": {"name": "reinforce"}, "rewards": [{"name": "exact_answer"}]}
    config = resolve_online("grpo", None, assignments, extra)
    policy, old = (load_policy(str(model), device=torch.device("cpu")) for _ in range(2))
    rewards = Rewards(config.rewards, policy.tokenizer)
    prompts = [Prompt(prompt, prompt, answer=answer) for prompt, answer in numbers.training]
    encoded = encode_prompts(Renderer(policy), prompts, config.sampling.max_new_tokens)
    run = Run.open(out, config, provenance(policy, str(model), "reversal", [], config.seed), resume=False)
    train_online(policy, encoded, rewards, config, run, stage=out.name, sampler=OldSampler(old, age))


if __name__ == "__main__":
    main()
