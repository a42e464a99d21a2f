"""What a reward model says of preference pairs and of rated completions: the rows that a reward report reduces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accord.engine.engine import Engine, EngineConfig
from accord.errors import DataError, ModelError
from accord.evaluate.answers import in_chunks, scores
from accord.evaluate.reward import EnsembleReport, RewardReport, evaluate_ensemble, evaluate_rewards
from accord.evaluate.reward_ratings import AttributeReport, evaluate_attribute
from accord.models.ensemble import RewardEnsemble
from accord.models.network import RewardModel
from accord.models.render import Renderer
from accord.models.trees import Tree
from accord.stats.agreement import Agreement
from accord.types import PreferencePair, Ranking, RatedCompletion, Source

__all__ = ["ScoredPairs", "rate", "score_pairs"]


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


def rate(
    network: RewardModel, records: Sequence[RatedCompletion], stage: str
) -> tuple[list[AttributeReport], list[str]]:
    """Compare the predicted ratings with the given ones; an ensemble predicts its members' mean.

    Returns:
        What the model knows and the data rates, attribute by attribute; and the attributes that the data does not rate.

    Raises:
        ModelError: the model predicts no ratings.
        DataError: the data rates nothing that the model predicts.
        RowError: a prompt is longer than the model's context.
    """
    if not network.attributes:
        fix = "Train one with the recipe `reward_ratings`, or measure this one on preferences."
        raise ModelError("This reward model predicts one score, and no ratings.", fix=fix)
    members = network.members if isinstance(network, RewardEnsemble) else [network]
    renderer = Renderer(network)
    trees = [renderer.tree(record) for record in records]
    predicted_RA = np.mean([_predicted(each, trees, stage) for each in members], axis=0)
    reports, unrated = [], []
    for column, attribute in enumerate(network.attributes):
        rows = [row for row, record in enumerate(records) if attribute.name in record.ratings]
        given = [records[row].ratings[attribute.name] for row in rows]
        if rows:
            reports.append(
                evaluate_attribute(attribute.name, predicted_RA[rows, column].tolist(), given, attribute.mean)
            )
        else:
            unrated.append(attribute.name)
    if not reports:
        raise DataError(f"The data rates none of {', '.join(unrated)}.", fix="Give ratings by these names.")
    return reports, unrated


def _predicted(model: RewardModel, trees: Sequence[Tree], stage: str) -> NDArray[np.float64]:
    """Predicted ratings in the units of the data: [completions, attributes]."""
    engine = Engine(model, EngineConfig())
    said = in_chunks(lambda chunk: engine.forward_statistics(chunk, frozenset({"ratings"})), trees, stage)
    rows = [branch["ratings"] for answers in said for branch in answers]
    means, stds = ([getattr(each, name) for each in model.attributes] for name in ("mean", "std"))
    predicted_RA: NDArray[np.float64] = np.array(rows, np.float64) * stds + means
    return predicted_RA
