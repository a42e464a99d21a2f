"""The one engine: `forward`, `forward_backward(trees, loss)`, `optim_step`. It never learns a loss's name.

Every loss depends on the network only through what the network says of completion tokens (log-probabilities ℓ) or of
completions (scores v). If the rows that a loss couples fit one micro-batch, one pass is enough. If not, a pass without
gradients gives ℓ and v, the loss gives ∂L/∂ℓ and ∂L/∂v, and a second pass backpropagates Σ(∂L/∂ℓ)·ℓ + Σ(∂L/∂v)·v.
Both give the same gradient.

A loss may also read one number of the step's control branches (`accord.models.controls`): they are computed before, all
of the step's in passes of their own without gradients, and never meet the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from accord.config import Config
from accord.engine.distributed import active, compute_device, gather, rank, share, world_size
from accord.engine.memory import TOKENS, MemoryModel, fit
from accord.engine.optimizer import OptimizerConfig, build_optimizer
from accord.engine.precision import Precision, autocast, resolve_precision
from accord.engine.sharding import ShardedNetwork, ShardingConfig, everywhere
from accord.engine.views import VIEWS, Said, drift, join, predicted
from accord.errors import AccordError, ConfigError
from accord.losses.records import BoundLoss
from accord.models.controls import control_tree
from accord.models.network import Network, whole
from accord.models.packing import MicroBatch, pack
from accord.models.trees import FloatArray, Tree

__all__ = ["Engine", "EngineConfig"]

Passes = Literal["auto", "one", "two"]

_LARGE = 1 << 24
"""Gradients of this many numbers (64 MB) keep their memory: among activations such a gap is hard to find again."""


class EngineConfig(Config):
    """How a step is computed; nothing here changes what is computed."""

    micro_batch_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Unique tokens in one forward pass. More tokens need more memory. `auto`: 1024, or what memory allows."""
    precision: Precision = "auto"
    """Precision of matrix products: bfloat16 where the hardware has it, float32 elsewhere."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again in the backward pass. `auto`: only where memory needs it (see `accord plan`)."""
    sharding: ShardingConfig | None = None
    """How many processes share the model (default: `strategy = "full"`)."""


class Engine:
    """A network, its optimiser, and the three verbs."""

    def __init__(
        self,
        network: Network,
        config: EngineConfig,
        optimizer: OptimizerConfig | None = None,
        *,
        beside: int = 0,
        alone: bool = False,
    ) -> None:
        """
        Args:
            beside: bytes that other networks of this process will take, beyond what is loaded already.
            alone: in a job of many processes, one of them uses this engine, whole; then it cannot train.
        """
        in_job = active() and not alone
        self.network, self.config, self.beside = network, config, beside
        self.device = compute_device() if in_job else network.device
        self.dtype = resolve_precision(config.precision, self.device)
        self.tokens, self.checkpointing = self._settle(trains=optimizer is not None)
        self.sharded: ShardedNetwork | None = None
        if in_job:
            self.sharded = ShardedNetwork(network, config.sharding or ShardingConfig(), self.device, self.dtype)
        elif config.sharding:
            fix = "Add --processes N (1 is enough), or leave these settings out."
            raise ConfigError("There are no processes to share the model.", where="[engine.sharding]", fix=fix)
        if optimizer and not self.sharded:
            for parameter in network.trainable():
                # Loaded weights are pages of their file; to write into those costs more than a copy.
                parameter.data = parameter.data.clone()
        self.optimizer_config = optimizer
        self.optimizer = build_optimizer(network.trainable(), optimizer) if optimizer else None
        network.model.train(optimizer is not None)
        if self.checkpointing:
            network.model.activation_checkpointing_enable()

    def forward(self, trees: Sequence[Tree]) -> list[list[FloatArray]]:
        """What the network says of every branch of every tree, without gradients.

        Returns:
            For each tree and branch: log-probabilities [L] (zero where no loss is carried), or the score [1].
        """
        answers = self.forward_statistics(trees)
        return [[named["scores" if "scores" in named else "logprobs"] for named in answer] for answer in answers]

    @torch.no_grad()
    def forward_statistics(
        self, trees: Sequence[Tree], statistics: frozenset[str] = frozenset()
    ) -> list[list[dict[str, FloatArray]]]:
        """What the network says of every branch of every tree, by name, without gradients.

        Args:
            statistics: what is wanted of a policy beside log-probabilities: `constant_entropy`, `values` and what else
                `accord.losses.records` names.

        Returns:
            For each tree and branch: `logprobs` and the statistics, [L] each (zero where no loss is carried); of a
            critic, `values` [L]; of a reward model, `scores` [1] and, where asked for, `ratings` [attributes].
        """
        with self._evaluating():
            said = self._everywhere(self._say(self._pack(trees), statistics))
        answers: list[list[dict[str, FloatArray]]] = [[{} for _ in tree.branches] for tree in trees]
        counts = torch.bincount(said.branch_N, minlength=len(said.owner_C)).tolist()
        masks = [predicted(trees[tree], branch) for tree, branch in said.owner_C]
        for name, values in said.outputs.tensors().items():
            if name in ("scores", "ratings"):  # of completions, not of tokens
                for (tree, branch), value in zip(said.owner_C, values.cpu(), strict=True):
                    answers[tree][branch][name] = value.reshape(-1).numpy()
                continue
            for (tree, branch), mask_L, piece in zip(said.owner_C, masks, values.cpu().split(counts), strict=True):
                answers[tree][branch][name] = np.zeros(len(mask_L), np.float32)
                answers[tree][branch][name][mask_L] = piece.numpy()
        return answers

    def forward_backward(
        self,
        trees: Sequence[Tree],
        bound: BoundLoss,
        passes: Passes = "auto",
        denominator: float | None = None,
    ) -> dict[str, float]:
        """Add the gradient of the loss, averaged over all trees given, and return loss and metrics (same average).

        Args:
            denominator: what the weighted sum of the losses is divided by (default: the sum of the trees' weights).
                Trees without a gradient can so be left out and keep their share. Metrics stay means over what is here.

        Raises:
            AccordError: the loss is not a finite number; the message names the rows.
        """
        batches = self._pack(trees)
        view = VIEWS[bound.loss.inputs]
        cut = any(len(part.branches) < len(trees[part.tree].branches) for b in batches for part in b.parts)
        coupled = bound.loss.couples_rows and (len(batches) > 1 or world_size() > 1)
        coupled = coupled or (view.couples_branches and any(gather(cut)))
        two = passes == "two" or (passes == "auto" and coupled)
        weight = sum(view.weight(tree) for tree in trees)
        if weight == 0:
            raise AccordError("This step holds nothing to learn from.", where=_places(trees), fix=_CHECK)
        denominator = weight if denominator is None else denominator
        control = self._control(trees) if view.controls else None
        totals: dict[str, Tensor] = {}
        if two:
            self._two_passes(trees, batches, bound, denominator, totals, control)
        else:
            for batch in batches:
                said = replace(self._say([batch], bound.loss.statistics), control=control)
                self._loss(trees, said, bound, denominator, totals).backward()
        return self._means(trees, bound, totals)

    @torch.no_grad()
    def evaluate(self, trees: Sequence[Tree], bound: BoundLoss) -> dict[str, float]:
        """Loss and metrics as `forward_backward` returns them, without gradients and without dropout."""
        view, totals = VIEWS[bound.loss.inputs], dict[str, Tensor]()
        denominator = sum(view.weight(tree) for tree in trees)
        if denominator == 0:
            raise AccordError("There is nothing to evaluate.", where=_places(trees), fix=_CHECK)
        with self._evaluating():
            control = self._control(trees) if view.controls else None
            said = self._everywhere(self._say(self._pack(trees), bound.loss.statistics))
        self._loss(trees, replace(said, control=control), bound, denominator, totals)
        self._count_once(totals)
        return self._means(trees, bound, totals)

    def optim_step(self, learning_rate: float) -> float:
        """Clip, step, clear. Returns the norm of the gradient before clipping."""
        if self.optimizer is None or self.optimizer_config is None:
            raise ValueError("This engine was built without an optimiser.")
        parameters = self.network.trainable()
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.gradient_clip, foreach=True))
        if not torch.isfinite(norm):
            raise AccordError(f"The gradient's norm is {norm.item()}.", fix="Lower optimizer.learning_rate.")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.zero_() if parameter.numel() >= _LARGE else None
        return float(norm)

    def _two_passes(
        self,
        trees: Sequence[Tree],
        batches: Sequence[MicroBatch],
        bound: BoundLoss,
        denominator: float,
        totals: dict[str, Tensor],
        control: Tensor | None,
    ) -> None:
        with torch.no_grad():
            said = self._say(batches, bound.loss.statistics)
        leaves = said.outputs.leaves()
        said = replace(said, outputs=leaves)
        if bound.loss.couples_rows:
            said = self._everywhere(said)
        self._loss(trees, replace(said, control=control), bound, denominator, totals).backward()
        if bound.loss.couples_rows:
            self._count_once(totals)
        gradients = {name: leaf.grad for name, leaf in leaves.tensors().items() if leaf.grad is not None}
        for batch in batches:
            outputs = self._say([batch], bound.loss.statistics & gradients.keys()).outputs.tensors()
            values = [outputs[name] for name in gradients]
            parts = [gradients[name][: len(outputs[name])] for name in gradients]
            torch.autograd.backward(values, parts)
            gradients = {name: gradient[len(outputs[name]) :] for name, gradient in gradients.items()}

    def _loss(
        self,
        trees: Sequence[Tree],
        said: Said,
        bound: BoundLoss,
        denominator: float,
        totals: dict[str, Tensor],
    ) -> Tensor:
        """The part of the step's average loss that these completions give.

        Adds to `totals` this part of the loss, and each metric's weighted sum and the weight of the rows it speaks of.
        """
        if not said.owner_C:  # idle: nothing is learned, but the backward pass runs through the whole network
            return torch.stack([values.sum() for values in said.outputs.tensors().values()]).sum()
        record = VIEWS[bound.loss.inputs].build(trees, said)
        output = bound.loss.function(record, bound.config)
        loss = (record.weight * output.loss).sum() / denominator
        _add(totals, "loss", loss.detach(), torch.ones_like(loss))
        for name, values in output.metrics.items():
            rows = ~values.isnan()
            total = torch.where(rows, record.weight * values.detach(), 0).sum()
            _add(totals, name, total, (record.weight * rows).sum())
        return loss

    @staticmethod
    def _means(trees: Sequence[Tree], bound: BoundLoss, totals: dict[str, Tensor]) -> dict[str, float]:
        numbers = torch.stack(list(totals.values())).tolist() if totals else []
        sums: dict[str, tuple[float, float]] = {}
        for own in gather(dict(zip(totals, numbers, strict=True))):
            for name, (total, weight) in own.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + total, before[1] + weight
        metrics = {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
        metrics["loss"] = sums["loss"][0]  # divided by the whole step's denominator already
        if bound.loss.derive is not None:
            metrics |= bound.loss.derive(metrics)
        if not np.isfinite(metrics["loss"]):
            raise AccordError(f"The loss is {metrics['loss']}.", where=_places(trees), fix=_CHECK)
        return metrics

    @torch.no_grad()
    def _control(self, trees: Sequence[Tree]) -> Tensor:
        """How far the policy has moved from the reference on the control branches of the whole step."""
        controls = [control_tree(tree) for tree in trees]
        return drift(controls, self._everywhere(self._say(self._pack(controls))))

    def _say(self, batches: Sequence[MicroBatch], statistics: frozenset[str] = frozenset()) -> Said:
        with autocast(self.device, self.dtype):
            return join(batches, [(self.sharded or self.network)(batch, statistics) for batch in batches])

    def _everywhere(self, said: Said) -> Said:
        return everywhere(said) if self.sharded else said

    @staticmethod
    def _count_once(totals: dict[str, Tensor]) -> None:
        """What every rank has computed for all of them is counted on rank 0."""
        if rank() > 0:
            totals.clear()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.network.model.training
        self.network.model.eval()
        yield
        self.network.model.train(training)
        if self.sharded:
            self.sharded.reshard()

    def _pack(self, trees: Sequence[Tree]) -> list[MicroBatch]:
        """This rank's share of the trees, in as many micro-batches as the other ranks have."""
        mine = share([len(tree) for tree in trees], world_size())[rank()] if self.sharded else None
        batches = pack(trees, self.tokens, branching=self.network.branching, indices=mine)
        if self.device.type != "cpu":
            batches = [batch.to(self.device) for batch in batches]
        if self.sharded:
            batches += [self.sharded.idle] * (max(gather(len(batches))) - len(batches))
        return batches

    def _settle(self, *, trains: bool) -> tuple[int, bool]:
        """Tokens per micro-batch, and whether activations are computed again: as set, else what memory allows."""
        tokens = None if self.config.micro_batch_tokens == "auto" else self.config.micro_batch_tokens
        again = {"auto": None, "on": True, "off": False}[self.config.activation_checkpointing]
        can = self.network.model.supports_gradient_checkpointing
        if again and not can:
            what = f"{type(self.network.model).__name__} cannot compute its activations again."
            raise ConfigError(what, where="engine.activation_checkpointing", fix="Leave it out.")
        if not trains or (tokens is not None and again is not None):
            return tokens or TOKENS, trains and bool(again)
        model = MemoryModel.of(self.network, self.dtype, self.device)
        fits = gather(fit(model, self.device, tokens, again if can else False, world_size(), self.beside))
        found = min(fits, key=lambda each: (each.tokens, not each.checkpointing))
        if (notice := found.notice()) and rank() == 0:
            print(notice, file=sys.stderr)
        return found.tokens, found.checkpointing


_CHECK = "Look at these rows with `accord data show`; check the learning rate."


def _places(trees: Sequence[Tree]) -> str:
    places = [str(tree.source) for tree in trees if tree.source is not None]
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def _add(totals: dict[str, Tensor], name: str, total: Tensor, weight: Tensor) -> None:
    both = torch.stack([total.float(), weight.float()])
    totals[name] = totals[name] + both if name in totals else both
