"""What the evidence on reversed numbers shares: the task, a model trained from scratch, and online runs.

The task: `48371=`, and the same digits from the last to the first, `17384`. Then any number of `~`, as in `17384~~~`:
room to be long in without being right. Demonstrations end with 0 to 8 of them, and the reward reads only the number.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig, learning_rate_at
from accord.losses import LOSSES
from accord.models.load import load_policy
from accord.models.network import Policy
from accord.models.render import Renderer
from accord.models.tiny import save_tiny
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig, completion_seed
from accord.train.rollouts import RolloutStore
from accord.types import Demonstration

SIZE = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "initializer_range": 0.02,
    "max_position_embeddings": 64,
}
"""0.3 million weights."""
NEW_TOKENS = 24
BATCH, COMPLETIONS = 32, 8
SETTINGS = {
    "batch_size": BATCH,
    "rollout.completions": COMPLETIONS,
    "sampling.max_new_tokens": NEW_TOKENS,
    "sampling.max_batch": BATCH * COMPLETIONS,
    "optimizer.learning_rate": 3e-4,
    "engine.micro_batch_tokens": 4096,
    "engine.precision": "float32",
    "samples": 0,
}
"""Of every online run here, whatever its recipe."""
_HELD_OUT = 500
_SFT_BATCH, _SFT_STEPS, _LOOK_EVERY = 64, 1000, 5


class Numbers:
    """10,000 seeded numbers of five digits, none of them 0, and each reversed: the first 500 are held out."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        places = self.random.choice(9**5, 10_000, replace=False)
        texts = ["".join(str(1 + place // 9**digit % 9) for digit in range(5)) for place in places.tolist()]
        rows = [(f"{text}=", text[::-1]) for text in texts]
        self.held_out, self.training = rows[:_HELD_OUT], rows[_HELD_OUT:]

    def write(self, path: Path) -> Path:
        """The training numbers as prompts with their answers, JSON lines."""
        rows = [json.dumps({"id": prompt, "prompt": prompt, "answer": answer}) for prompt, answer in self.training]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return path

    def demonstrations(self, count: int) -> list[Demonstration]:
        rows = [self.training[int(row)] for row in self.random.integers(0, len(self.training), count)]
        return [Demonstration(prompt, answer + "~" * int(self.random.integers(0, 9))) for prompt, answer in rows]


def beginner(directory: Path, seed: int, wanted: float = 0.3) -> Path:
    """A model trained from scratch on demonstrations until it solves this share of the held-out numbers."""
    numbers = Numbers(seed)
    return taught(directory, seed, numbers.demonstrations, lambda policy: solved(policy, numbers.held_out) >= wanted)


def taught(
    directory: Path,
    seed: int,
    demonstrations: Callable[[int], list[Demonstration]],
    enough: Callable[[Policy], bool],
) -> Path:
    """A model trained from scratch until that is enough, `directory`/model.

    Args:
        demonstrations: the next ones, so many.
    """
    save_tiny(directory / "random", seed=seed, **SIZE)
    policy = load_policy(str(directory / "random"), device=torch.device("cpu"))
    schedule = OptimizerConfig(learning_rate=2e-3, schedule="constant", warmup=0.02)
    settings = EngineConfig(precision="float32", micro_batch_tokens=4096, activation_checkpointing="off")
    engine, loss, renderer = Engine(policy, settings, schedule), LOSSES["sft"].bind({}), Renderer(policy)
    for step in range(_SFT_STEPS):
        if step % _LOOK_EVERY == 0 and enough(policy):
            policy.model.eval()
            policy.save(directory / "model")
            return directory / "model"
        trees = renderer.trees(demonstrations(_SFT_BATCH))
        engine.forward_backward(trees, loss)
        engine.optim_step(learning_rate_at(step, _SFT_STEPS, schedule))
    raise SystemExit(f"{_SFT_STEPS} steps of SFT are not enough.")


def solved(policy: Policy, rows: Sequence[tuple[str, str]], completions: int = 1, seed: int = 0) -> float:
    """The share of sampled completions (temperature 1) that are right: pass@1."""
    return float(np.mean(answers(policy, rows, completions, seed)))


def answers(policy: Policy, rows: Sequence[tuple[str, str]], completions: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Which completions are right: [rows, completions]."""
    encode = policy.tokenizer.encode
    requests = [
        Request(prompt, tuple(encode(prompt)), completion_seed(seed, prompt, k))
        for prompt, _ in rows
        for k in range(completions)
    ]
    sampled = LocalSampler(policy, "float32").sample(requests, SamplingConfig(max_new_tokens=NEW_TOKENS, max_batch=512))
    texts = np.array([completion.text.rstrip("~") for completion in sampled]).reshape(len(rows), completions)
    right: npt.NDArray[np.bool_] = texts == np.array([[answer] for _, answer in rows])
    return right


def train(recipe: str, model: Path, prompts: Path, out: Path, settings: Mapping[str, Any]) -> list[dict[str, float]]:
    """`accord train RECIPE`, as a user types it; returns the metrics of every step."""
    command = [sys.executable, "-m", "accord", "train", recipe, "--model", str(model), "--data", str(prompts)]
    command += ["--reward", "exact_answer", "--out", str(out)]
    for name, value in {**SETTINGS, **settings}.items():
        command += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return metrics_of(out)


def metrics_of(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def lengths(run: Path, steps: int) -> tuple[list[float], list[float]]:
    """Mean tokens of right and of wrong completions, step by step, from what the run has kept of its rollouts."""
    store, right, wrong = RolloutStore(run), [], []
    for step in range(steps):
        completions, found = store.completions(step, range(BATCH)), store.rewards(step, 0)
        assert found is not None
        counts = np.array([len(completions[i, k].token_ids) for i in range(BATCH) for k in range(COMPLETIONS)])
        is_right = np.array([reward.value == 1 for reward in found[0]])
        right.append(float(counts[is_right].mean()) if is_right.any() else float("nan"))
        wrong.append(float(counts[~is_right].mean()) if not is_right.all() else float("nan"))
    store.close()
    return right, wrong
