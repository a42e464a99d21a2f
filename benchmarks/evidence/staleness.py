"""Learning from what an older policy has sampled: 0 to 8 steps old, with and without importance weights.

    python benchmarks/evidence/staleness.py --write

`none` is REINFORCE, which takes stale completions for its own; `clip` is GRPO's clipped ratio to the policy that
sampled; `truncated` is CISPO's weight, that ratio and at most 2. All compare the completions of a prompt without
dividing by their standard deviation. Prints pass@1 of the held-out numbers and the effective sample size of the last 20
steps. The last line is JSON; --write keeps it in baselines/ and draws docs/images/staleness.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import conclude, draw
from reversal import SETTINGS, Numbers, beginner, metrics_of, solved
from torch import Tensor

from accord.models.load import load_policy
from accord.models.network import Policy
from accord.models.render import Renderer
from accord.rewards import Rewards
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.sampler import OnFinish
from accord.train import OnlineConfig, Run, encode_prompts, provenance, resolve_online, train_online
from accord.types import Completion, Prompt

AGES = (0, 1, 2, 4, 8)
LOSSES: dict[str, dict[str, Any]] = {
    "none": {"name": "reinforce"},
    "clip": {"name": "ppo_clip"},
    "truncated": {"name": "cispo", "max_ratio": 2.0},
}
_ENDS = 20


class OldSampler:
    """Samples from the weights that it was given `age` loads ago; from the oldest ones while there are fewer."""

    def __init__(self, policy: Policy, age: int) -> None:
        self.local = LocalSampler(policy, "float32")
        self.kept: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=age + 1)

    @property
    def policy_version(self) -> int:
        return self.local.policy_version

    @property
    def weights_hash(self) -> str:
        return self.local.weights_hash

    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        state = policy.state() if state is None else state
        self.kept.append((version, {name: tensor.clone() for name, tensor in state.items()}))
        oldest, weights = self.kept[0]
        self.local.policy.model.load_state_dict(weights)
        self.local.policy_version = oldest

    def sample(
        self, requests: Sequence[Request], config: SamplingConfig, *, on_finish: OnFinish | None = None
    ) -> list[Completion]:
        return self.local.sample(requests, config, on_finish=on_finish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of each of a seed's 15 runs (default: 150)")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--write", action="store_true", help="keep the result and draw the curves")
    options = parser.parse_args()
    passed: dict[str, list[list[float]]] = {name: [] for name in LOSSES}
    sizes: dict[str, list[list[float]]] = {name: [] for name in LOSSES}
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            root, numbers = Path(temporary), Numbers(seed)
            model = beginner(root, seed)
            for name, loss in LOSSES.items():
                rows = []
                for age in AGES:
                    config = _config(loss, options.steps, seed)
                    policy, metrics = _run(model, numbers, config, age, root / f"{name}-{age}")
                    size = [step.get("effective_sample_size", np.nan) for step in metrics[-_ENDS:]]
                    row = {"pass@1": solved(policy, numbers.held_out, 8, seed=1), "sample size": np.nanmean(size)}
                    rows.append({key: round(float(value), 3) for key, value in row.items()})
                    found.append({"correction": name, "age": age, "seed": seed, **rows[-1]})
                    print(json.dumps(found[-1]), flush=True)
                passed[name].append([row["pass@1"] for row in rows])
                sizes[name].append([row["sample size"] for row in rows])
    if options.write:
        panels = {"held-out pass@1": passed, "effective sample size": sizes}
        draw("staleness", panels, across="age in steps", places=AGES)
    conclude("staleness", {"runs": found}, write=options.write)


def _config(loss: dict[str, Any], steps: int, seed: int) -> OnlineConfig:
    settings = [f"{name}={json.dumps(value)}" for name, value in {**SETTINGS, "steps": steps, "seed": seed}.items()]
    extra = {"loss": loss, "rewards": [{"name": "exact_answer"}], "advantage": {"scale": "none"}}
    return resolve_online("grpo", None, settings, extra)


def _run(
    model: Path, numbers: Numbers, config: OnlineConfig, age: int, out: Path
) -> tuple[Policy, list[dict[str, float]]]:
    policy, old = (load_policy(str(model), device=torch.device("cpu")) for _ in range(2))
    rewards = Rewards(config.rewards, policy.tokenizer)
    prompts = [Prompt(prompt, prompt, answer=answer) for prompt, answer in numbers.training]
    encoded = encode_prompts(Renderer(policy), prompts, config.sampling.max_new_tokens)
    run = Run.open(out, config, provenance(policy, str(model), "reversal", [], config.seed), resume=False)
    train_online(policy, encoded, rewards, config, run, stage=out.name, sampler=OldSampler(old, age))
    return policy, metrics_of(out)


if __name__ == "__main__":
    main()
