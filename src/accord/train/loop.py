"""The one training loop: order, steps, metrics, checkpoints, resume. It never learns the name of a loss.

A run that is killed at any moment goes on from its last checkpoint to the same parameters, bit for bit: the order of
the data and the random numbers of a step are functions of the seed and the step alone.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import lru_cache
from types import FrameType

import numpy as np
import torch

from accord.engine.checkpoint import load_checkpoint, save_checkpoint
from accord.engine.distributed import active, gather, rank
from accord.engine.engine import Engine
from accord.engine.memory import explain_shortage
from accord.engine.optimizer import learning_rate_at
from accord.engine.reference import Reference, attach_reference
from accord.engine.views import VIEWS
from accord.errors import DataError
from accord.models.allocator import release_memory
from accord.models.controls import with_controls
from accord.models.lora import add_lora
from accord.models.network import Network
from accord.models.starter import cache_directory
from accord.models.trees import IntArray, Tree, share_prompts
from accord.tracking import Progress, Tracking
from accord.train.config import TrainConfig, bind_loss
from accord.train.examples import StreamedTrees, Trees, batches
from accord.train.run import Run
from accord.train.samples import SamplePage
from accord.train.validation import Validation, hold_out

__all__ = ["batch_indices", "total_steps", "train"]


_REFERENCE_ROWS = 256
"""Streamed rows that are sorted by length and given to the reference together."""
_TIDY_EVERY = 16
"""Steps between returns of free memory: blocks of ever new sizes leave holes, and the heap would grow with the run."""


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
    reference = _streamed_reference(engine, streamed, config) if streamed is not None else None
    if not isinstance(trees, StreamedTrees):
        if view.kind == "labels":
            trees = share_prompts(trees)
        if view.controls:
            trees = with_controls(trees, config.seed, config.max_tokens or network.context)
        if view.reference:
            trees = _with_reference(engine, trees)
    heldout: list[Tree] = []
    if config.validation.share:
        trees, heldout = hold_out(trees, config.validation.share, config.seed)
    samples = SamplePage(engine, trees, run, count=config.samples, seed=config.seed)
    checkpoint = run.latest()
    start = load_checkpoint(engine, checkpoint) if checkpoint else 0
    validation = Validation(engine, bound, heldout, config.validation, run, start) if heldout else None
    total, first = total_steps(len(trees), config), rank() == 0
    order = (batch_indices(step, len(trees), config) for step in range(start, total))
    with (
        closing(batches(trees, order)) as feed,
        Tracking(run.directory, config, config.trackers, resume_step=start) if first else nullcontext() as tracking,
        Progress(stage, total, unit="tokens", done=start, quiet=not first) as progress,
        _stop_between_steps() as stopped,
    ):
        for step in range(start, total):
            if validation and validation.exhausted:
                break
            began = time.perf_counter()
            batch = _next(feed, engine, run, step if step > start else 0)
            if not batch:  # none of its rows could be used, and the user wants to go on without them
                continue
            if reference:
                batch = reference.attach(batch)
            torch.manual_seed(config.seed + step)
            metrics = engine.forward_backward(batch, bound)
            rate = learning_rate_at(step, total, config.optimizer)
            metrics["grad_norm"] = engine.optim_step(rate)
            tokens = sum(len(tree) for tree in batch)
            row = {**metrics, "learning_rate": rate, "tokens": tokens, "seconds": time.perf_counter() - began}
            if validation:
                row |= validation.measure(step + 1, total)
            if tracking:
                tracking.log(step + 1, {**row, "epoch": (step + 1) / math.ceil(len(trees) / config.batch_size)})
            progress.advance(1, work=tokens, **_shown(metrics))
            if (step + 1) % _TIDY_EVERY == 0:
                release_memory()
            stop = any(gather(bool(stopped)))  # all ranks stop behind the same step
            if stop or ((step + 1) % config.checkpoint_every == 0 and step + 1 < total):
                save_checkpoint(engine, run.checkpoints, step + 1)
            if stop:
                raise KeyboardInterrupt
    if validation:
        validation.restore()
    samples.finish()
    network.model.eval()
    state = network.state() if active() else None
    if first:
        network.save(run.model, state)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    gather(None)


def _next(feed: Iterator[list[Tree]], engine: Engine, run: Run, done: int) -> list[Tree]:
    """The trees of a step. If a row cannot be used, the steps that were done are saved before the error goes on."""
    try:
        return next(feed)
    except DataError:
        if done:
            save_checkpoint(engine, run.checkpoints, done)
        raise


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


def _streamed_reference(engine: Engine, trees: StreamedTrees, config: TrainConfig) -> Reference:
    """With LoRA the reference stays at hand, and each step asks it. Without, it is asked now about every row in use."""
    reference = Reference(engine, cache_directory() / "reference.sqlite")
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


def _with_reference(engine: Engine, trees: Sequence[Tree]) -> Sequence[Tree]:
    cache = cache_directory() / "reference.sqlite"
    total = sum(1 + bool(tree.controls) for tree in trees)
    with Progress("Reference", total, unit="tokens", quiet=rank() > 0) as progress:
        return attach_reference(engine, trees, cache, lambda count, tokens: progress.advance(count, work=tokens))


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    names = {"loss": "loss", "rewards/accuracies": "accuracy", "accuracy": "accuracy", "grad_norm": "grad"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


@contextmanager
def _stop_between_steps() -> Iterator[list[int]]:
    """The first Ctrl-C is noted and taken after the running step; the second one is immediate.

    In a job of many processes there is no second one: the launcher hands on what the terminal has sent already.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted and not active():
            signal.default_int_handler(number, frame)
        noted.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: whoever runs us handles signals
        yield noted
        return
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
