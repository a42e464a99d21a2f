"""Several reward models as one: the mean of their scores, less where they disagree (Coste et al. 2023, §3.2).

A directory with ensemble.json and one model per member loads wherever a reward model does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from accord.models.network import Outputs, RewardModel
from accord.models.packing import MicroBatch

__all__ = ["FILE", "RewardEnsemble", "describe"]

FILE = "ensemble.json"


class RewardEnsemble(RewardModel):
    """Reward models with the same tokenizer, in memory together. It scores; it is not trained.

    Attributes:
        members: the models. Where only one is asked for (its tokenizer, its context), it is the first.
        penalty: standard deviations between the members that are taken from their mean.
    """

    def __init__(self, members: Sequence[RewardModel], penalty: float = 0.0) -> None:
        first = members[0]
        super().__init__(first.model, first.tokenizer, branching=all(member.branching for member in members))
        self.members, self.penalty = tuple(members), penalty

    def __call__(self, batch: MicroBatch, statistics: frozenset[str] = frozenset()) -> Outputs:  # noqa: ARG002
        """The members' combined score of every completion."""
        scores = [member(batch).scores_C for member in self.members]
        scores_MC = torch.stack([each for each in scores if each is not None])
        return Outputs(scores_C=scores_MC.mean(0) - self.penalty * scores_MC.std(0, correction=0))

    def combine(self, scores_MC: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean − penalty · standard deviation over the members, from scores that were computed apart: [C]."""
        combined: NDArray[np.float64] = scores_MC.mean(0) - self.penalty * scores_MC.std(0)
        return combined


def describe(directory: Path, members: Sequence[str], penalty: float) -> None:
    """Write what makes the models in `directory` one ensemble."""
    text = json.dumps({"members": list(members), "penalty": penalty}, indent=2)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")
