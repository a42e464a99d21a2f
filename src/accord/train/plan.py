"""What a run will cost, before it is started: memory by part, tokens per step, time to finish.

Memory comes from the model of `accord.engine.memory`; time, and the peak that the prediction is held against, from
three real steps on the data, the last of which holds the largest micro-batch of the run. Nothing is written.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from accord.engine.engine import Engine
from accord.engine.memory import SMALLEST, Load, Memory, MemoryModel, usable_memory
from accord.engine.precision import resolve_precision
from accord.engine.reference import attach_reference
from accord.errors import ConfigError
from accord.models.controls import with_controls
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Network
from accord.models.packing import pack
from accord.models.trees import Tree, share_prompts
from accord.tracking import Progress
from accord.train.config import TrainConfig, bind_loss, view_of
from accord.train.examples import StreamedTrees, Trees, batches
from accord.train.offline import batch_indices, total_steps
from accord.train.validation import hold_out

__all__ = ["Advice", "Data", "Plan", "Timing", "make_plan"]

_LOOKED_AT = 500
"""Steps whose rows are packed, evenly over the first epoch, to find the averages and the largest micro-batch."""
_PROCESSES = 8
"""GPUs of one machine, as advice."""


@dataclass(frozen=True, slots=True)
class Data:
    """The data as the run will see it; tokens are averages per optimiser step.

    Attributes:
        steps: of the whole run.
        looked_at: how many of them the figures come from.
        tokens: unique tokens.
        lengths: of a prompt with one completion: median, 90 % quantile, longest.
    """

    steps: int
    looked_at: int
    tokens: float
    loss_tokens: float
    micro_batches: float
    lengths: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Timing:
    """What the probe measured.

    Attributes:
        reference: seconds for the reference log-probabilities of all rows (0 where there are none).
        training: seconds for all steps.
        fastest, slowest: the same by the faster and the slower of the two timed steps.
        peak: bytes.
    """

    reference: float
    training: float
    fastest: float
    slowest: float
    peak: int


class Advice(NamedTuple):
    """A change, what to type for it, and the bytes that the run would then need."""

    what: str
    type: str
    memory: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will cost.

    Attributes:
        tokens: unique tokens per micro-batch.
        checkpointing: whether activations are computed again.
        reference: memory of the reference pass before training, where there is one.
        capacity: bytes that may be used.
        advice: what makes it smaller, where it does not fit.
        timing: None where it does not fit, so that it was not tried.
    """

    data: Data
    tokens: int
    checkpointing: bool
    memory: Memory
    reference: Memory | None
    capacity: int
    advice: tuple[Advice, ...] = ()
    timing: Timing | None = None

    @property
    def needed(self) -> int:
        """Bytes at the peak of the whole run."""
        return max(self.memory.total, self.reference.total if self.reference else 0)

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity


def make_plan(network: Network, trees: Trees, config: TrainConfig) -> Plan:
    """Predict what training `network` on `trees` costs, and try three steps if that fits. The network is changed.

    Raises:
        ConfigError: an ensemble is to be trained.
    """
    if config.reward_model.members > 1:
        fix = "Plan one of them: --set reward_model.members=1"
        raise ConfigError("The members of an ensemble are trained one after the other.", fix=fix)
    view = view_of(config)
    if config.lora:
        add_lora(network, config.lora, config.seed)
    model = MemoryModel.of(network, resolve_precision(config.engine.precision, network.device))
    engine = Engine(network, config.engine, config.optimizer)
    if not isinstance(trees, StreamedTrees):
        trees = share_prompts(trees) if view.kind == "labels" else trees
        trees = with_controls(trees, config.seed, config.max_tokens or network.context) if view.controls else trees
    if config.validation.share:
        trees, _ = hold_out(trees, config.validation.share, config.seed)
    steps = _steps(trees, config)
    looked = _look(network, trees, config, steps, engine.tokens)
    made = Plan(
        data=looked.data,
        tokens=engine.tokens,
        checkpointing=engine.checkpointing,
        memory=looked.training(model, checkpointing=engine.checkpointing),
        reference=model.forward(looked.loads[looked.largest]) if view.reference else None,
        capacity=usable_memory(network.device),
    )
    if not made.fits:
        smaller = _look(network, trees, config, steps, SMALLEST)
        return replace(made, advice=_advice(network, config, engine, model, looked, smaller))
    probed = [steps[len(steps) // 3], steps[2 * len(steps) // 3], steps[looked.largest]]
    return replace(made, timing=_probe(engine, trees, config, probed, looked.data))


class _Looked(NamedTuple):
    """What the rows of some steps ask: the largest load of each step, and which step has the largest of all."""

    data: Data
    loads: list[Load]
    largest: int

    def training(self, model: MemoryModel, *, checkpointing: bool, processes: int = 1) -> Memory:
        accumulates = self.data.micro_batches > 1
        load = self.loads[self.largest]
        return model.training(load, checkpointing=checkpointing, accumulates=accumulates, processes=processes)


def _steps(trees: Trees, config: TrainConfig) -> list[list[int]]:
    """The rows of some steps of the first epoch, the one with the longest tree among them."""
    epoch = min(math.ceil(len(trees) / config.batch_size), total_steps(len(trees), config))
    rows = [batch_indices(step, len(trees), config) for step in range(epoch)]
    some = [rows[i] for i in np.unique(np.linspace(0, epoch - 1, _LOOKED_AT).astype(int))]
    if not isinstance(trees, StreamedTrees):
        lengths = [len(tree) for tree in trees]
        longest = max(rows, key=lambda step: max(lengths[row] for row in step))
        some += [longest] if longest not in some else []
    return some


def _look(network: Network, trees: Trees, config: TrainConfig, steps: Sequence[Sequence[int]], budget: int) -> _Looked:
    loads: list[Load] = []
    counts: list[tuple[int, int, int]] = []
    lengths: list[int] = []
    with closing(batches(trees, steps)) as feed, Progress("Look at the data", len(steps), unit="tokens") as progress:
        for batch in feed:
            packed = pack(batch, budget, branching=network.branching)
            found = [Load.of(part, network) for part in packed]
            loads.append(max(found, key=lambda load: (load.tokens, load.loss_tokens)))
            tokens = sum(len(tree) for tree in batch)
            counts.append((tokens, sum(load.loss_tokens for load in found), len(found)))
            lengths += [len(tree.prompt_P) + len(b.tokens_L) for tree in batch for b in tree.branches]
            progress.advance(1, work=tokens)
    per_step = np.mean(counts, axis=0).tolist()
    median, most, longest = np.quantile(lengths, (0.5, 0.9, 1.0)).astype(int).tolist()
    data = Data(
        steps=total_steps(len(trees), config),
        looked_at=len(steps),
        tokens=per_step[0],
        loss_tokens=per_step[1],
        micro_batches=per_step[2],
        lengths=(median, most, longest),
    )
    largest = max(range(len(loads)), key=lambda i: (loads[i].tokens, loads[i].loss_tokens, loads[i].cells))
    return _Looked(data, loads, largest)


def _advice(
    network: Network, config: TrainConfig, engine: Engine, model: MemoryModel, looked: _Looked, smaller: _Looked
) -> tuple[Advice, ...]:
    """Changes that lower the peak of training, each alone, then LoRA with all of them."""
    again, can = "--set engine.activation_checkpointing=on", network.model.supports_gradient_checkpointing
    fewer = f"--set engine.micro_batch_tokens={SMALLEST}"
    now, sets = engine.checkpointing, []
    if not now and can:
        memory = looked.training(model, checkpointing=True)
        sets.append(Advice("compute activations again (8 to 18 % slower)", again, memory.total))
    if engine.tokens > SMALLEST:
        sets.append(Advice("smaller micro-batches", fewer, smaller.training(model, checkpointing=now).total))
        memory = smaller.training(model, checkpointing=now or can)
        sets.append(Advice("both", f"{again} {fewer}", memory.total))
    memory = looked.training(model, checkpointing=now, processes=_PROCESSES)
    sets.append(Advice(f"share the model among {_PROCESSES} GPUs", f"--processes {_PROCESSES}", memory.total))
    if config.lora is None:
        add_lora(network, LoRAConfig())
        lora = replace(MemoryModel.of(network, engine.dtype), program=model.program)
        sets.append(Advice("train LoRA adapters", "--lora", looked.training(lora, checkpointing=now).total))
        memory = smaller.training(lora, checkpointing=now or can)
        sets.append(Advice("LoRA and the above", f"--lora {again} {fewer}", memory.total))
    return tuple(sets)


def _probe(engine: Engine, trees: Trees, config: TrainConfig, steps: Sequence[Sequence[int]], data: Data) -> Timing:
    """Three steps: the first warms up, the others are timed; the last one has the largest micro-batch."""
    bound, seconds = bind_loss(config), []
    with closing(batches(trees, steps)) as feed:
        examples = list(feed)
    reference = 0.0
    if view_of(config).reference:
        examples, rate = _reference(engine, examples)
        reference = rate * data.tokens * data.steps / config.epochs
    with Progress("Probe", len(steps), unit="tokens") as progress:
        for batch in examples:
            tokens = sum(len(tree) for tree in batch)
            began = time.perf_counter()
            engine.forward_backward(batch, bound)
            middle = time.perf_counter()
            engine.optim_step(config.optimizer.learning_rate)
            _wait(engine)
            seconds.append(((middle - began) / tokens) * data.tokens + time.perf_counter() - middle)
            progress.advance(1, work=tokens)
    timed = [data.steps * second for second in seconds[1:]]
    return Timing(reference, sum(timed) / len(timed), min(timed), max(timed), _peak(engine))


def _reference(engine: Engine, examples: list[list[Tree]]) -> tuple[list[list[Tree]], float]:
    """The steps' trees with reference log-probabilities, and seconds per token."""
    marks: list[tuple[float, int]] = []
    flat = [tree for batch in examples for tree in batch]
    with TemporaryDirectory() as directory:
        cache = Path(directory) / "reference.sqlite"
        done = attach_reference(engine, flat, cache, lambda _, tokens: marks.append((time.perf_counter(), tokens)))
    attached = iter(done)
    tokens = sum(count for _, count in marks)
    return [[next(attached) for _ in batch] for batch in examples], (marks[-1][0] - marks[0][0]) / max(1, tokens)


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _peak(engine: Engine) -> int:
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(engine.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
