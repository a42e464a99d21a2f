"""A held-out part of the data: its loss while a run trains, early stopping, and the best weights kept.

What was measured stands in metrics.jsonl, so a run that is taken up again decides as it would have without a pause.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence, Sized

from pydantic import Field

from accord.config import Config
from accord.engine.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from accord.engine.engine import Engine
from accord.errors import ConfigError, EmptyDataError
from accord.losses.records import BoundLoss
from accord.models.trees import Tree
from accord.tracking import read_metrics
from accord.train.run import Run

__all__ = ["Validation", "ValidationConfig", "hold_out"]

_LOSS = "validation/loss"


class ValidationConfig(Config):
    """Hold out a part of the data, watch its loss, and keep the weights with the lowest."""

    share: float = Field(0.0, ge=0, lt=1)
    """The share of all prompts that is held out; a prompt is held out with all its rows."""
    every: int = Field(50, gt=0)
    """Optimiser steps between evaluations; the last step is always evaluated."""
    patience: int | None = Field(None, gt=0)
    """Stop once so many evaluations in a row have not lowered the held-out loss (default: train to the end)."""


def hold_out(trees: Sized, share: float, seed: int) -> tuple[list[Tree], list[Tree]]:
    """Split into a part to train on and a held-out part with `share` of the prompts, drawn from the seed.

    Which prompts are drawn depends on their tokens alone, not on the order of the rows.

    Raises:
        EmptyDataError: there are too few prompts to split.
        ConfigError: the rows stream from disk.
    """
    if not isinstance(trees, Sequence):
        what = "Data that streams from disk cannot be split while it trains."
        fix = "Leave validation.share out, and split with `accord data split`."
        raise ConfigError(what, where="validation.share", fix=fix)
    drawn = {tree.prompt_P.tobytes(): _draw(tree, seed) for tree in trees}
    order = sorted(drawn, key=drawn.__getitem__)
    count = max(1, round(share * len(order)))
    if count >= len(order):
        fix = "Give more data, or lower validation.share."
        raise EmptyDataError(f"{len(order)} prompts cannot be split for validation.", fix=fix)
    chosen = set(order[:count])
    kept = [tree for tree in trees if tree.prompt_P.tobytes() not in chosen]
    return kept, [tree for tree in trees if tree.prompt_P.tobytes() in chosen]


def _draw(tree: Tree, seed: int) -> bytes:
    return hashlib.blake2b(tree.prompt_P.tobytes(), digest_size=16, key=f"validation {seed}".encode()).digest()


class Validation:
    """The held-out loss of a run, from step to step.

    Attributes:
        best_step: the step with the lowest held-out loss so far.
        exhausted: whether patience has run out.
    """

    def __init__(
        self, engine: Engine, bound: BoundLoss, trees: Sequence[Tree], config: ValidationConfig, run: Run, start: int
    ) -> None:
        self.engine, self.bound, self.trees, self.config = engine, bound, trees, config
        self.directory = run.checkpoints / "best"
        self.best, self.best_step, self.waited = math.inf, 0, 0
        for row in read_metrics(run.directory):
            if row["step"] <= start and _LOSS in row:
                self._note(int(row["step"]), row[_LOSS])

    @property
    def exhausted(self) -> bool:
        return self.config.patience is not None and self.waited >= self.config.patience

    def measure(self, step: int, total: int) -> dict[str, float]:
        """Held-out loss and metrics after `step` where an evaluation is due; the best weights are kept."""
        if step % self.config.every and step != total:
            return {}
        said = self.engine.evaluate(self.trees, self.bound)
        metrics = {f"validation/{name}": value for name, value in said.items()}
        if self._note(step, metrics[_LOSS]):
            save_checkpoint(self.engine, self.directory, step)
        return metrics

    def restore(self) -> None:
        """Give the network its best weights back."""
        best = latest_checkpoint(self.directory)
        if best is not None:
            load_checkpoint(self.engine, best)

    def _note(self, step: int, loss: float) -> bool:
        better = loss < self.best
        if better:
            self.best, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1
        return better
