"""Accord's side of `offline.py`: the steps of a plan on the engine, timed. Started by `offline.py`.

A step is what the training loop does per step: pack, forward and backward, clip, optimiser step.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.engine.reference import attach_reference
from accord.losses import LOSSES, BoundLoss
from accord.models.load import load_policy, load_reward_model
from accord.models.network import Network
from accord.models.render import Renderer
from accord.models.starter import STARTER
from accord.models.trees import Tree
from accord.types import Demonstration, PreferencePair
from offline_plan import BETA, LEARNING_RATE, Consumed, Plan, Task, Worker, consumed, draw_score_head

CPU = torch.device("cpu")


def main(path: str) -> None:
    plan, worker = Plan.read(path), Worker()
    network: Network = (load_reward_model if plan.task == "reward" else load_policy)(STARTER, device=CPU)
    if plan.task == "reward":
        draw_score_head(network.model)
    settings = EngineConfig(precision=plan.precision)
    trees = _trees(network, plan)
    if plan.task == "dpo":
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            cache = Path(directory) / "reference.sqlite"
            trees = attach_reference(Engine(network, settings), trees, cache, lambda *_: None)
        worker.reference(time.perf_counter() - began, len(trees))
    rate = LEARNING_RATE[plan.task]
    engine = Engine(network, settings, OptimizerConfig(learning_rate=rate))
    bound = _loss(plan.task)
    for indices in plan.steps:
        batch = [trees[index] for index in indices]
        began = time.perf_counter()
        metrics = engine.forward_backward(batch, bound)
        engine.optim_step(rate)
        worker.step(time.perf_counter() - began, metrics["loss"], _consumed(plan.task, batch))
    worker.end()


def _trees(network: Network, plan: Plan) -> list[Tree]:
    renderer = Renderer(network)
    if plan.task == "sft":
        return [renderer.tree(Demonstration(prompt, completion)) for prompt, completion in plan.rows]
    return [renderer.tree(PreferencePair(prompt, chosen, rejected)) for prompt, chosen, rejected in plan.rows]


def _loss(task: Task) -> BoundLoss:
    name, options = {
        "dpo": ("dpo", {"beta": BETA}),
        "reward": ("bradley_terry", {"centre": 0.0}),
        "sft": ("sft", {}),
    }[task]
    return LOSSES[name].bind(options)


def _consumed(task: Task, batch: Sequence[Tree]) -> Consumed:
    """A reward model has no token that carries loss."""
    sequences = []
    for tree in batch:
        for branch in tree.branches:
            tokens = [*tree.prompt_P.tolist(), *branch.tokens_L.tolist()]
            mask = [False] * len(tree.prompt_P) + branch.loss_mask_L.tolist()
            sequences.append((tokens, [False] * len(tokens) if task == "reward" else mask))
    return consumed(sequences)


if __name__ == "__main__":
    main(sys.argv[1])
