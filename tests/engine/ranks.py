"""One rank of a job that trains tiny networks, run by test_sharding.py: `ranks.py DIRECTORY models|train|resume …`.

Without RANK in the environment it is a plain single process. Rank 0 writes what came out to DIRECTORY/<world>-….pt.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from accord.engine.checkpoint import load_checkpoint, save_checkpoint
from accord.engine.distributed import process_group, rank, world_size
from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.engine.sharding import ShardingConfig
from accord.losses import LOSSES
from accord.models.load import load_policy, load_reward_model
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Policy
from accord.models.tiny import tiny_model, tiny_tokenizer
from accord.models.trees import Branch, Tree

# name: (architecture, loss, its settings, what else)
CASES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "sft": ("llama", "sft", {}, set()),
    "sft-untied": ("qwen2", "sft", {}, {"recompute"}),
    "sft-lora": ("llama", "sft", {}, {"lora"}),
    "sft-zero2": ("llama", "sft", {}, {"grad"}),
    "sft-bfloat16": ("llama", "sft", {}, {"bfloat16"}),
    "reward": ("llama", "bradley_terry", {"centre": 0.01}, {"reward"}),
    "reward-lora": ("llama", "bradley_terry", {}, {"reward", "lora"}),
    "dpo": ("llama", "dpo", {}, set()),
    "dpo-lora": ("gpt2", "dpo", {}, {"lora"}),
    "coupled": ("llama", "aot", {}, set()),
    "ppo": ("llama", "ppo", {"kl_coefficient": 0.1, "entropy_coefficient": 0.01}, {"values"}),
}
RESUMED = ("sft", "reward-lora", "dpo-lora", "coupled")
STEPS, HALF = 10, 5


def batch(step: int) -> list[Tree]:
    """Four trees of random tokens; in every third step one alone, so that a second rank is idle."""
    rng = np.random.default_rng(step)
    trees = []
    for _ in range(1 if step % 3 == 1 else 4):
        lengths = rng.integers(2, 12, 2)
        branches = []
        for length in lengths:
            mask = np.ones(length, bool)
            branch = Branch(rng.integers(3, 259, length), mask, -5 * rng.random(length, np.float32))
            branches.append(replace(branch, **rollout(length)))
        trees.append(Tree(rng.integers(3, 259, rng.integers(1, 20)), tuple(branches), ranks=(0, 1)))
    return trees


def rollout(length: int) -> dict[str, Any]:
    """What a sampled completion carries."""
    wave = np.cos(np.arange(length, dtype=np.float32))
    return {"behaviour_L": wave - 6, "advantage_L": wave, "weight_L": wave**2, "value_L": -wave, "return_L": 2 * wave}


def build(name: str, directory: Path) -> Engine:
    architecture, _, _, more = CASES[name]
    place = directory / f"{architecture}-{'reward' in more}"
    load = load_reward_model if "reward" in more else load_policy
    network = load(str(place), device=torch.device("cpu"))
    if "lora" in more:
        add_lora(network, LoRAConfig(rank=3))  # three rows on two ranks: uneven shards
    if isinstance(network, Policy) and "values" in more:
        network.add_value_head()
    config = EngineConfig(
        micro_batch_tokens=32,  # some trees of a step are cut, most steps take several micro-batches
        precision="bfloat16" if "bfloat16" in more else "float32",
        activation_checkpointing="on" if "recompute" in more else "off",
        sharding=ShardingConfig(strategy="grad") if "grad" in more and world_size() > 1 else None,
    )
    # AdamW divides by the size of the gradient: where that is rounding, its sign would decide a whole step.
    return Engine(network, config, OptimizerConfig(weight_decay=0.01, gradient_clip=0.5, epsilon=1e-5))


def advance(name: str, engine: Engine, steps: range) -> list[dict[str, float]]:
    _, loss, settings, _ = CASES[name]
    rows = []
    for step in steps:
        metrics = engine.forward_backward(batch(step), LOSSES[loss].bind(settings))
        rows.append({**metrics, "norm": engine.optim_step(1e-3)})
    return rows


def write(path: Path, engine: Engine, rows: list[dict[str, float]]) -> None:
    state = {name: tensor.clone() for name, tensor in engine.network.state().items()}
    said = engine.forward(batch(0))
    if rank() == 0:
        torch.save({"state": state, "rows": rows, "said": [list(map(torch.from_numpy, tree)) for tree in said]}, path)


def save_models(directory: Path) -> None:
    for architecture, reward in [("llama", False), ("qwen2", False), ("gpt2", False), ("llama", True)]:
        layers = {"n_layer" if architecture == "gpt2" else "num_hidden_layers": 2}
        model = tiny_model(architecture, **layers)
        if reward:
            model.config.num_labels, model.config.pad_token_id = 1, 0
            torch.manual_seed(0)
            model = transformers.AutoModelForSequenceClassification.from_config(model.config)
        model.save_pretrained(directory / f"{architecture}-{reward}")
        tiny_tokenizer().save_pretrained(directory / f"{architecture}-{reward}")


def main(directory: Path, verb: str) -> None:
    world = world_size()
    if verb == "train":
        for name in CASES:
            engine = build(name, directory)
            rows = advance(name, engine, range(HALF))
            save_checkpoint(engine, directory / f"{world}-{name}", HALF)
            write(directory / f"{world}-{name}.pt", engine, rows + advance(name, engine, range(HALF, STEPS)))
    for name in RESUMED if verb == "resume" else ():
        for wrote in (1, 2):
            engine = build(name, directory)
            start = load_checkpoint(engine, directory / f"{wrote}-{name}" / str(HALF))
            rows = advance(name, engine, range(start, STEPS))
            write(directory / f"{wrote}-to-{world}-{name}.pt", engine, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, *verbs = sys.argv[1:]
    with process_group():
        for word in verbs:
            save_models(Path(place)) if word == "models" else main(Path(place), word)
