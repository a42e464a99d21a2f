"""Training on data: rows in an order that the seed decides, the reference before the first step, a held-out part."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import lru_cache

import numpy as np

from accord.engine.checkpoint import load_checkpoint
from accord.engine.distributed import rank
from accord.engine.engine import Engine
from accord.engine.memory import explain_shortage
from accord.engine.reference import Reference, attach_reference
from accord.engine.views import VIEWS
from accord.models.controls import with_controls
from accord.models.lora import add_lora
from accord.models.network import Network
from accord.models.starter import cache_directory
from accord.models.trees import IntArray, Tree, share_prompts
from accord.tracking import Progress
from accord.train.config import TrainConfig, bind_loss
from accord.train.examples import StreamedTrees, Trees, batches
from accord.train.loop import Learner, Loop, Step, Update, save_model
from accord.train.run import Run
from accord.train.samples import SamplePage
from accord.train.validation import Validation, hold_out

__all__ = ["batch_indices", "total_steps", "train"]


_REFERENCE_ROWS = 256
"""Streamed rows that are sorted by length and given to the reference together."""


@explain_shortage()
def train(network: Network, trees: Trees, config: TrainConfig, run: Run, *, stage: str) -> None:
    """Train `network` in place and write it to the run's directory.

    The network as it is given is the reference, where the loss has one; LoRA is added to it where the settings say so.

    Args:
        trees: one per prompt, in memory or on disk.
        stage: the name under which progress is shown.

    Raises:
        ResourceError: memory runs out.
    """
    bound = bind_loss(config)
    if config.reward_model.members > 1:
        raise ValueError("An ensemble is trained by train_ensemble.")
    view = VIEWS[bound.loss.inputs]
    if config.lora:
        add_lora(network, config.lora, config.seed)
    network.noise = config.neftune_alpha
    engine = Engine(network, config.engine, config.optimizer)
    streamed = trees if isinstance(trees, StreamedTrees) and view.reference else None
    # What `run` knows is the hash of the weights before they were put into 4 bits.
    weights = None if config.lora and config.lora.quantise else run.weights
    reference = _streamed_reference(engine, streamed, config, weights) if streamed is not None else None
    if not isinstance(trees, StreamedTrees):
        if view.kind == "labels":
            trees = share_prompts(trees)
        if view.controls:
            trees = with_controls(trees, config.seed, config.max_tokens or network.context)
        if view.reference:
            trees = _with_reference(engine, trees, weights)
    heldout: list[Tree] = []
    if config.validation.share:
        trees, heldout = hold_out(trees, config.validation.share, config.seed)
    samples = SamplePage(engine, trees, run, count=config.samples, seed=config.seed)
    checkpoint = run.latest()
    start = load_checkpoint(engine, checkpoint) if checkpoint else 0
    validation = Validation(engine, bound, heldout, config.validation, run, start) if heldout else None
    total = total_steps(len(trees), config)
    loop = Loop(run, config, [Learner(engine, bound)], start, total, stage, math.ceil(len(trees) / config.batch_size))
    loop.go(_steps(trees, config, range(start, total), reference), validation)
    if validation:
        validation.restore()
    samples.finish()
    save_model(network, run)


def _steps(trees: Trees, config: TrainConfig, steps: range, reference: Reference | None) -> Generator[Step, None, None]:
    """What each step trains on; a step without updates is one of which no row could be used, and may be left out."""
    order = (batch_indices(step, len(trees), config) for step in steps)
    with closing(batches(trees, order)) as feed:
        for batch in feed:
            ready = reference.attach(batch) if reference and batch else batch
            yield Step([Update(ready)] if ready else [])


def total_steps(rows: int, config: TrainConfig) -> int:
    """Optimiser steps of the whole run; the last batch of an epoch may be smaller."""
    steps = config.epochs * math.ceil(rows / config.batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps


def batch_indices(step: int, rows: int, config: TrainConfig) -> list[int]:
    """Which rows optimiser step `step` trains on: every row once per epoch, in an order drawn from (seed, epoch)."""
    epoch, position = divmod(step, math.ceil(rows / config.batch_size))
    order = _order(config.seed, epoch, rows)
    return [int(i) for i in order[position * config.batch_size : (position + 1) * config.batch_size]]


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, rows: int) -> IntArray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def _streamed_reference(engine: Engine, trees: StreamedTrees, config: TrainConfig, weights: str | None) -> Reference:
    """With LoRA the reference stays at hand, and each step asks it. Without, it is asked now about every row in use."""
    reference = Reference(engine, cache_directory() / "reference.sqlite", weights)
    if config.lora:
        return reference
    rows = np.sort(_order(config.seed, 0, len(trees))[: total_steps(len(trees), config) * config.batch_size])
    notice = "All weights are trained, so the reference is computed first. With --lora it is computed as training goes."
    print(f"{notice}\n{len(rows):,} rows, each once: they are kept in {reference.cache}")
    chunks = [rows[start : start + _REFERENCE_ROWS].tolist() for start in range(0, len(rows), _REFERENCE_ROWS)]
    quiet = rank() > 0
    with (
        Progress("Reference", len(rows), unit="tokens", quiet=quiet) as progress,
        closing(batches(trees, chunks)) as feed,
    ):
        for indices, chunk in zip(chunks, feed, strict=True):
            progress.advance(len(indices), work=reference.compute(chunk))
    return reference


def _with_reference(engine: Engine, trees: Sequence[Tree], weights: str | None) -> Sequence[Tree]:
    cache = cache_directory() / "reference.sqlite"
    total = sum(1 + bool(tree.controls) for tree in trees)
    with Progress("Reference", total, unit="tokens", quiet=rank() > 0) as progress:

        def done(count: int, tokens: int) -> None:
            progress.advance(count, work=tokens)

        return attach_reference(engine, trees, cache, done, weights)
