"""The one engine: `forward`, `forward_backward(trees, loss)`, `optim_step`. It never learns a loss's name.

Every loss depends on the network only through what the network says of completion tokens (log-probabilities ℓ) or of
completions (scores v). If the rows that a loss couples fit one micro-batch, one pass is enough. If not, a pass without
gradients gives ℓ and v, the loss gives ∂L/∂ℓ and ∂L/∂v, and a second pass backpropagates Σ(∂L/∂ℓ)·ℓ + Σ(∂L/∂v)·v.
Both give the same gradient.

A loss may also read one number of the step's control branches (`accord.models.controls`): they are computed before, all
of the step's in passes of their own without gradients, and never meet the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch
from pydantic import Field
from torch import Tensor

from accord.config import Config
from accord.engine.optimizer import OptimizerConfig, build_optimizer
from accord.engine.precision import Precision, autocast, resolve_precision
from accord.engine.views import VIEWS, Said, drift, join
from accord.errors import AccordError
from accord.losses.records import Loss
from accord.models.controls import control_tree
from accord.models.network import Network, Outputs
from accord.models.packing import MicroBatch, pack
from accord.models.trees import Tree

__all__ = ["BoundLoss", "Engine", "EngineConfig"]

Passes = Literal["auto", "one", "two"]


class EngineConfig(Config):
    """How a step is computed; nothing here changes what is computed."""

    micro_batch_tokens: int = Field(1024, gt=0)
    """Unique tokens in one forward pass. More tokens need more memory."""
    precision: Precision = "auto"
    """Precision of matrix products: bfloat16 where the hardware has it, float32 elsewhere."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again in the backward pass. `auto`: only if they would not fit into half the free memory."""


@dataclass(frozen=True, slots=True)
class BoundLoss:
    """A loss with its settings."""

    loss: Loss
    config: Config


class Engine:
    """A network, its optimiser, and the three verbs."""

    def __init__(self, network: Network, config: EngineConfig, optimizer: OptimizerConfig | None = None) -> None:
        self.network, self.config = network, config
        self.device = network.device
        self.dtype = resolve_precision(config.precision, self.device)
        self.optimizer_config = optimizer
        self.optimizer = build_optimizer(network.trainable(), optimizer) if optimizer else None
        network.model.train(optimizer is not None)
        if optimizer is not None and self._needs_checkpointing():
            network.model.activation_checkpointing_enable()

    @torch.no_grad()
    def forward(self, trees: Sequence[Tree]) -> list[list[npt.NDArray[np.float32]]]:
        """What the network says of every branch of every tree, without gradients.

        Returns:
            For each tree and branch: log-probabilities [L] (zero where no loss is carried), or the score [1].
        """
        said = self._say(self._pack(trees))
        answers: list[list[npt.NDArray[np.float32]]] = [
            [np.zeros(len(branch.tokens_L), np.float32) for branch in tree.branches] for tree in trees
        ]
        if said.outputs.scores_C is not None:
            for (tree, branch), score in zip(said.owner_C, said.outputs.scores_C.cpu().numpy(), strict=True):
                answers[tree][branch] = np.array([score], np.float32)
        if said.outputs.logprobs_N is not None:
            counts = torch.bincount(said.branch_N, minlength=len(said.owner_C)).tolist()
            pieces = said.outputs.logprobs_N.cpu().split(counts)
            for (tree, branch), values in zip(said.owner_C, pieces, strict=True):
                mask_L = trees[tree].branches[branch].loss_mask_L.copy()
                mask_L[0] &= len(trees[tree].prompt_P) > 0
                answers[tree][branch][mask_L] = values.numpy()
        return answers

    def forward_backward(self, trees: Sequence[Tree], bound: BoundLoss, passes: Passes = "auto") -> dict[str, float]:
        """Add the gradient of the loss, averaged over all trees given, and return loss and metrics (same average).

        Raises:
            AccordError: the loss is not a finite number; the message names the rows.
        """
        batches = self._pack(trees)
        whole = all(len(part.branches) == len(trees[part.tree].branches) for b in batches for part in b.parts)
        view = VIEWS[bound.loss.inputs]
        coupled = (bound.loss.couples_rows and len(batches) > 1) or (view.couples_branches and not whole)
        two = passes == "two" or (passes == "auto" and coupled)
        denominator = sum(view.weight(tree) for tree in trees)
        if denominator == 0:
            raise AccordError("This step holds nothing to learn from.", where=_places(trees), fix=_CHECK)
        control = self._control(trees) if view.controls else None
        totals: dict[str, Tensor] = {}
        if two:
            self._two_passes(trees, batches, bound, denominator, totals, control)
        else:
            for batch in batches:
                said = replace(self._say([batch]), control=control)
                self._loss(trees, said, bound, denominator, totals).backward()
        means = zip(totals, torch.stack(list(totals.values())).tolist(), strict=True)
        metrics = {name: total / weight for name, (total, weight) in means if weight > 0}
        if bound.loss.derive is not None:
            metrics |= bound.loss.derive(metrics)
        if not np.isfinite(metrics["loss"]):
            raise AccordError(f"The loss is {metrics['loss']}.", where=_places(trees), fix=_CHECK)
        return metrics

    def optim_step(self, learning_rate: float) -> float:
        """Clip, step, clear. Returns the norm of the gradient before clipping."""
        if self.optimizer is None or self.optimizer_config is None:
            raise ValueError("This engine was built without an optimiser.")
        parameters = self.network.trainable()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.gradient_clip, foreach=True)
        if not torch.isfinite(norm):
            raise AccordError(f"The gradient's norm is {norm.item()}.", fix="Lower optimizer.learning_rate.")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
            said = self._say(batches)
        leaves = Outputs(*(v if v is None else v.detach().requires_grad_() for v in _fields(said.outputs)))
        said = replace(said, outputs=leaves, control=control)
        self._loss(trees, said, bound, denominator, totals).backward()
        start = [0, 0]
        for batch in batches:
            outputs = _fields(self._say([batch]).outputs)
            for index, (values, leaf) in enumerate(zip(outputs, _fields(leaves), strict=True)):
                if values is not None and leaf is not None and leaf.grad is not None:
                    stop = start[index] + len(values)
                    values.backward(leaf.grad[start[index] : stop])
                    start[index] = stop

    def _loss(
        self,
        trees: Sequence[Tree],
        said: Said,
        bound: BoundLoss,
        denominator: float,
        totals: dict[str, Tensor],
    ) -> Tensor:
        """The part of the step's average loss that these completions give.

        Adds to `totals` each metric's weighted sum and the weight of the rows that it speaks of.
        """
        record = VIEWS[bound.loss.inputs].build(trees, said)
        output = bound.loss.function(record, bound.config)
        loss = (record.weight * output.loss).sum() / denominator
        _add(totals, "loss", loss.detach(), record.weight.sum() / denominator)
        for name, values in output.metrics.items():
            rows = ~values.isnan()
            total = torch.where(rows, record.weight * values.detach(), 0).sum()
            _add(totals, name, total, (record.weight * rows).sum())
        return loss

    @torch.no_grad()
    def _control(self, trees: Sequence[Tree]) -> Tensor:
        """How far the policy has moved from the reference on the control branches of the whole step."""
        controls = [control_tree(tree) for tree in trees]
        return drift(controls, self._say(self._pack(controls)))

    def _say(self, batches: Sequence[MicroBatch]) -> Said:
        with autocast(self.device, self.dtype):
            return join(batches, [self.network(batch) for batch in batches])

    def _pack(self, trees: Sequence[Tree]) -> list[MicroBatch]:
        batches = pack(trees, self.config.micro_batch_tokens, branching=self.network.branching)
        return [batch.to(self.device) for batch in batches] if self.device.type != "cpu" else batches

    def _needs_checkpointing(self) -> bool:
        if self.config.activation_checkpointing != "auto":
            return self.config.activation_checkpointing == "on"
        config = self.network.model.config.get_text_config()
        hidden = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        # What a layer keeps for backward, in bytes per token: measured on Llama shapes, half as much again in float32.
        per_layer = (48 * hidden + 16 * inner) * (1.0 if self.dtype == torch.bfloat16 else 1.5)
        wanted = self.config.micro_batch_tokens * config.num_hidden_layers * per_layer
        weights = sum(p.numel() for p in self.network.trainable()) * 12  # gradient and two moments, float32
        free = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else psutil.virtual_memory().available
        return bool(wanted > 0.5 * max(0, free - weights))


_CHECK = "Look at these rows with `accord data show`; check the learning rate."


def _places(trees: Sequence[Tree]) -> str:
    places = [str(tree.source) for tree in trees if tree.source is not None]
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def _add(totals: dict[str, Tensor], name: str, total: Tensor, weight: Tensor) -> None:
    both = torch.stack([total.float(), weight.float()])
    totals[name] = totals[name] + both if name in totals else both


def _fields(outputs: Outputs) -> tuple[Tensor | None, Tensor | None]:
    return outputs.logprobs_N, outputs.scores_C
