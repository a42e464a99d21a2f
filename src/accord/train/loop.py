"""The one training loop: steps, updates, metrics, checkpoints, Ctrl-C. It never learns where its steps come from.

A run that is killed at any moment goes on from its last checkpoint to the same parameters, bit for bit: what a step
trains on and the random numbers of a step are functions of the seed and the step alone, or are kept on disk.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType

import torch

from accord.engine.checkpoint import save_checkpoint
from accord.engine.distributed import active, gather, rank
from accord.engine.engine import Engine
from accord.engine.optimizer import OptimizerConfig, learning_rate_at
from accord.errors import DataError, RunError, SamplerError
from accord.losses.records import BoundLoss
from accord.models.allocator import release_memory
from accord.models.network import Network
from accord.models.trees import Tree
from accord.tracking import Progress, Tracking
from accord.train.config import TrainConfig
from accord.train.online_config import OnlineConfig
from accord.train.run import Run
from accord.train.validation import Validation

__all__ = ["Learner", "Loop", "Step", "Update", "save_model"]

_TIDY_EVERY = 16
"""Steps between returns of free memory: blocks of ever new sizes leave holes, and the heap would grow with the run."""


@dataclass(frozen=True, slots=True)
class Update:
    """The trees of one optimiser update, and what their weighted losses are divided by (default: their weights)."""

    trees: Sequence[Tree]
    denominator: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of the run does, one update after the other.

    A step without updates learns nothing; one that has no metrics, either, is passed over.
    """

    updates: Sequence[Update]
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What is known before learning."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What was spent on it before learning, by name; metrics show each as a share of the step."""
    enough: Callable[[Mapping[str, float]], bool] | None = None
    """Asked with the metrics of each update: whether to leave the step's remaining updates."""


@dataclass(frozen=True, slots=True)
class Learner:
    """An engine that takes every update, and the loss that it takes it with."""

    engine: Engine
    bound: BoundLoss
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Other names of some of its metrics."""

    def learn(self, update: Update, step: int, total: int) -> dict[str, float]:
        """One optimiser update; its metrics."""
        metrics = self.engine.forward_backward(update.trees, self.bound, denominator=update.denominator)
        rate = learning_rate_at(step, total, self.engine.optimizer_config or OptimizerConfig())
        metrics["grad_norm"] = self.engine.optim_step(rate)
        metrics["learning_rate"] = rate
        return {self.renamed.get(name, name): value for name, value in metrics.items()}


@dataclass(frozen=True, slots=True)
class Loop:
    """What all training has in common.

    Args:
        learners: the first is that of the model which the run is about.
        start: steps that are done already.
        stage: the name under which progress is shown.
        epoch_steps: steps of one pass over the data.
        settle: called before a checkpoint is written; returns when what follows needs no older weights.
    """

    run: Run
    config: TrainConfig | OnlineConfig
    learners: Sequence[Learner]
    start: int
    total: int
    stage: str
    epoch_steps: int
    settle: Callable[[], None] | None = None

    def go(self, feed: Generator[Step, None, None], validation: Validation | None = None) -> None:
        """Take a step for everything that the feed yields: it is asked for a step when the one before it is learned.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step that ran is finished and saved.
        """
        config, first = self.config, rank() == 0
        tracking_of = Tracking(self.run.directory, config, config.trackers, resume_step=self.start) if first else None
        with (
            closing(feed),
            tracking_of or nullcontext() as tracking,
            Progress(self.stage, self.total, unit="tokens", done=self.start, quiet=not first) as progress,
            _stop_between_steps() as stopped,
        ):
            for step in range(self.start, self.total):
                if validation and validation.exhausted:
                    break
                began = time.perf_counter()
                this = self._next(feed, step)
                if not this.updates and not this.metrics:
                    continue
                row = self._learn(this, step, began)
                if validation:
                    row |= validation.measure(step + 1, self.total)
                if tracking:
                    tracking.log(step + 1, {**row, "epoch": (step + 1) / self.epoch_steps})
                progress.advance(1, work=row["tokens"], **_shown(row))
                if (step + 1) % _TIDY_EVERY == 0:
                    release_memory()
                stop = any(gather(bool(stopped)))  # all ranks stop behind the same step
                if stop or ((step + 1) % config.checkpoint_every == 0 and step + 1 < self.total):
                    self._save(step + 1)
                if stop:
                    raise KeyboardInterrupt

    def _learn(self, this: Step, step: int, began: float) -> dict[str, float]:
        """All updates of a step; the row of metrics that it leaves."""
        torch.manual_seed(self.config.seed + step)
        ready, tokens = time.perf_counter(), 0
        seen: list[dict[str, float]] = []
        for update in this.updates:
            metrics: dict[str, float] = {}
            for learner in self.learners:
                metrics |= learner.learn(update, step, self.total)
            seen.append(metrics)
            tokens += sum(len(tree) for tree in update.trees)
            if this.enough and this.enough(metrics):
                break
        row = {**_means(seen), **this.metrics, "tokens": tokens, "seconds": time.perf_counter() - began}
        if this.seconds:
            row["updates"] = len(seen)
            spent = {**this.seconds, "backward": time.perf_counter() - ready}
            row |= {f"time/{name}": seconds / row["seconds"] for name, seconds in spent.items()}
        return row

    def _next(self, feed: Iterator[Step], step: int) -> Step:
        """The next step. If there can be none, the steps that were done are saved before the error goes on."""
        try:
            return next(feed)
        except (DataError, RunError, SamplerError):
            if step > self.start:
                self._save(step)
            raise

    def _save(self, step: int) -> None:
        if self.settle is not None:
            self.settle()
        first, *others = [learner.engine for learner in self.learners]
        save_checkpoint(first, self.run.checkpoints, step, others)


def save_model(network: Network, run: Run) -> None:
    """Write the trained model; the checkpoints have then served."""
    network.model.eval()
    state = network.state() if active() else None
    if rank() == 0:
        network.save(run.model, state)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    gather(None)


def _means(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over the updates that have it."""
    found: dict[str, list[float]] = {}
    for metrics in seen:
        for name, value in metrics.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    names = {
        "reward": "reward",
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "accuracy": "accuracy",
        "grad_norm": "grad",
    }
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
