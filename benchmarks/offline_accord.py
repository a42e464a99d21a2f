"""Accord's side of `offline.py`: the steps of a plan on the engine, timed. Started by `offline.py`.

A step is what the training loop does per step: pack, forward and backward, clip, optimiser step.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch

from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.engine.reference import attach_reference
from accord.engine.views import VIEWS
from accord.losses import LOSSES, BoundLoss
from accord.models.load import load_policy, load_reward_model
from accord.models.network import Network
from accord.models.render import Renderer
from accord.models.starter import STARTER
from accord.models.trees import Branch, Tree, share_prompts
from accord.types import Demonstration, LabelledCompletion, PreferencePair
from offline_plan import BETA, LEARNING_RATE, Consumed, Plan, Task, Worker, consumed, draw_score_head

CPU = torch.device("cpu")


def main(path: str) -> None:
    plan, worker = Plan.read(path), Worker()
    network: Network = (load_reward_model if plan.task == "reward" else load_policy)(STARTER, device=CPU)
    if plan.task == "reward":
        draw_score_head(network.model)
    settings = EngineConfig(precision=plan.precision)
    bound = _loss(plan.task)
    batches = _batches(network, plan)
    if VIEWS[bound.loss.inputs].reference:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            cache, trees = Path(directory) / "reference.sqlite", list(chain.from_iterable(batches))
            done = iter(attach_reference(Engine(network, settings), trees, cache, lambda *_: None))
        worker.reference(time.perf_counter() - began, len(trees))
        batches = [list(islice(done, len(batch))) for batch in batches]
    rate = LEARNING_RATE[plan.task]
    engine = Engine(network, settings, OptimizerConfig(learning_rate=rate))
    for batch in batches:
        began = time.perf_counter()
        metrics = engine.forward_backward(batch, bound)
        engine.optim_step(rate)
        worker.step(time.perf_counter() - began, metrics["loss"], _consumed(plan.task, batch))
    worker.end()


def _batches(network: Network, plan: Plan) -> list[list[Tree]]:
    """The trees of every step."""
    renderer = Renderer(network)
    if plan.task == "kto":
        return [_labelled([plan.rows[index] for index in step], renderer) for step in plan.steps]
    record = Demonstration if plan.task == "sft" else PreferencePair
    trees = [renderer.tree(record(*row)) for row in plan.rows]
    return [[trees[index] for index in step] for step in plan.steps]


def _labelled(rows: Sequence[Sequence[str]], renderer: Renderer) -> list[Tree]:
    """The answers of one step by prompt, each with the control that TRL gives it: the next answer of the step."""
    trees = [renderer.tree(LabelledCompletion(prompt, answer, label == "good")) for prompt, answer, label in rows]
    controls: dict[bytes, list[Branch]] = {}
    for tree, following in zip(trees, [*trees[1:], trees[0]], strict=True):
        controls.setdefault(tree.prompt_P.tobytes(), []).extend(following.branches)
    return [replace(tree, controls=tuple(controls[tree.prompt_P.tobytes()])) for tree in share_prompts(trees)]


def _loss(task: Task) -> BoundLoss:
    name, options = {
        "dpo": ("dpo", {"beta": BETA}),
        "dpo_chat": ("dpo", {"beta": BETA}),
        "reward": ("bradley_terry", {"centre": 0.0}),
        "sft": ("sft", {}),
        "kto": ("kto", {"beta": BETA}),
        "orpo": ("orpo", {"beta": BETA}),
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
