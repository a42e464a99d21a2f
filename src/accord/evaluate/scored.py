"""Preference pairs with the scores of a reward model: the rows that a reward report reduces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accord.evaluate.answers import scores
from accord.evaluate.reward import EnsembleReport, RewardReport, evaluate_ensemble, evaluate_rewards
from accord.models.ensemble import RewardEnsemble
from accord.models.network import RewardModel
from accord.models.render import Renderer
from accord.models.trees import Tree
from accord.stats.agreement import Agreement
from accord.types import PreferencePair, Ranking, Source

__all__ = ["ScoredPairs", "score_pairs"]


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Trees, and the scores of all their branches in order: the model's [branches], its members' [members, branches].

    Example: ``score_pairs(load_reward_model("runs/rm/model"), records, "Held-out pairs").report()``
    """

    trees: Sequence[Tree]
    scores: NDArray[np.float64]
    members: NDArray[np.float64] | None

    def report(
        self, *, ceiling: Agreement | None = None, slices: Mapping[Source, str] | None = None, seed: int = 0
    ) -> RewardReport:
        """Reduce all pairs; `slices` names the slice of each row of the data."""
        better, worse, owners = self._pairs()
        branches = [branch for tree in self.trees for branch in tree.branches]
        names = None
        if slices is not None:
            names = [slices[tree.source] if tree.source is not None else "" for tree in owners]
        return evaluate_rewards(
            self.scores[better].tolist(),
            self.scores[worse].tolist(),
            chosen_lengths=[len(branches[index].tokens_L) for index in better],
            rejected_lengths=[len(branches[index].tokens_L) for index in worse],
            ceiling=ceiling,
            slices=names,
            seed=seed,
        )

    def ensemble(self) -> EnsembleReport | None:
        """How far the members agree; None if the model is no ensemble."""
        if self.members is None:
            return None
        better, worse, _ = self._pairs()
        return evaluate_ensemble((self.members[:, better] - self.members[:, worse]).tolist())

    def _pairs(self) -> tuple[list[int], list[int], list[Tree]]:
        better, worse, owners = [], [], []
        start = 0
        for tree in self.trees:
            for i, j in tree.pairs:
                better.append(start + i)
                worse.append(start + j)
                owners.append(tree)
            start += len(tree.branches)
        return better, worse, owners


def score_pairs(network: RewardModel, records: Sequence[PreferencePair | Ranking], stage: str) -> ScoredPairs:
    """Score every completion of every record.

    Raises:
        RowError: a prompt is longer than the model's context.
    """
    renderer = Renderer(network)
    trees = [renderer.tree(record) for record in records]

    def scored(model: RewardModel, name: str) -> NDArray[np.float64]:
        return np.array([score for row in scores(model, trees, name) for score in row])

    if not isinstance(network, RewardEnsemble):
        return ScoredPairs(trees, scored(network, stage), None)
    total = len(network.members)
    members = np.stack([scored(each, f"{stage} {k}/{total}") for k, each in enumerate(network.members, start=1)])
    return ScoredPairs(trees, network.combine(members), members)
