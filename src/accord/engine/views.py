"""From what the network says of packed trees to the record that a loss reads, and the record's total weight.

The weight depends on the trees alone, so the denominator of a whole optimiser step is known before its first forward
pass: packing, accumulation and world size cannot change the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from accord.data.usable import Kind
from accord.losses.records import ControlledLogprobs, LabelledLogprobs, PairScores, PreferenceLogprobs, TokenLogprobs
from accord.models.network import Network, Outputs, Policy, RewardModel
from accord.models.packing import MicroBatch
from accord.models.trees import Tree

__all__ = ["VIEWS", "Said", "View", "drift", "join"]


@dataclass(frozen=True, slots=True)
class Said:
    """What the network said of the completions of some trees.

    `owner_C` names each completion as (index of its tree, index of its branch); `branch_N` says which completion
    each log-probability belongs to; `control` is the drift of the whole step's control branches, where it is wanted.
    """

    owner_C: tuple[tuple[int, int], ...]
    branch_N: Tensor
    outputs: Outputs
    control: Tensor | None = None

    def completion_sums(self, values_N: Tensor) -> Tensor:
        """Sum of per-token values over each completion: [C]."""
        return values_N.new_zeros(len(self.owner_C)).index_add(0, self.branch_N, values_N)


@dataclass(frozen=True, slots=True)
class View:
    """How to build one kind of record, and how much weight a tree has in it."""

    build: Callable[[Sequence[Tree], Said], TokenLogprobs | PreferenceLogprobs | LabelledLogprobs | PairScores]
    weight: Callable[[Tree], float]
    couples_branches: bool
    """Whether a row of the record needs several branches of a tree."""
    kind: Kind
    """The data that such rows come from."""
    network: type[Network]
    """The network that says what the record holds."""
    reference: bool = False
    """Whether the record holds log-probabilities of the reference model, which the trees must then carry."""
    controls: bool = False
    """Whether the record holds the drift of the step's control branches, which the trees must then carry."""


def join(batches: Sequence[MicroBatch], outputs: Sequence[Outputs]) -> Said:
    """What the network said of several micro-batches, as one."""
    owners: list[tuple[int, int]] = []
    branches: list[Tensor] = []
    for batch in batches:
        branches.append(batch.branch_N + len(owners))
        owners += [(part.tree, k) for part in batch.parts for k in part.branches]
    logprobs = [o.logprobs_N for o in outputs if o.logprobs_N is not None]
    scores = [o.scores_C for o in outputs if o.scores_C is not None]
    joined = Outputs(torch.cat(logprobs) if logprobs else None, torch.cat(scores) if scores else None)
    return Said(tuple(owners), torch.cat(branches), joined)


def _tokens(trees: Sequence[Tree], said: Said) -> TokenLogprobs:  # noqa: ARG001
    logprobs_N = _present(said.outputs.logprobs_N)
    return TokenLogprobs(logprobs_N, torch.ones_like(logprobs_N))


def _token_weight(tree: Tree) -> float:
    unpredicted = sum(bool(b.loss_mask_L[0]) for b in tree.branches) if len(tree.prompt_P) == 0 else 0
    return float(sum(int(branch.loss_mask_L.sum()) for branch in tree.branches) - unpredicted)


def _preferences(trees: Sequence[Tree], said: Said) -> PreferenceLogprobs:
    policy_C, reference_C = _policy_and_reference(trees, said)
    better_B, worse_B, weight_B, _ = _pairs(trees, said, policy_C)
    return PreferenceLogprobs(
        policy_C[better_B], policy_C[worse_B], reference_C[better_B], reference_C[worse_B], weight_B
    )


def _labelled(trees: Sequence[Tree], said: Said) -> LabelledLogprobs:
    policy_C, reference_C = _policy_and_reference(trees, said)
    good_C = torch.tensor([trees[tree].labels[k] for tree, k in said.owner_C], device=policy_C.device)
    return LabelledLogprobs(policy_C, reference_C, good_C, torch.ones_like(policy_C))


def _controlled(trees: Sequence[Tree], said: Said) -> ControlledLogprobs:
    rows = _labelled(trees, said)
    return ControlledLogprobs(rows.policy_B, rows.ref_B, rows.good_B, rows.weight_B, _present(said.control))


def _label_weight(tree: Tree) -> float:
    return float(len(tree.labels))


def drift(trees: Sequence[Tree], said: Said) -> Tensor:
    """Mean over completions of log π − log π_ref."""
    policy_C, reference_C = _policy_and_reference(trees, said)
    return (policy_C - reference_C).mean()


def _policy_and_reference(trees: Sequence[Tree], said: Said) -> tuple[Tensor, Tensor]:
    """Log-probability of every completion under the policy and under the reference: [C] twice."""
    policy_C = said.completion_sums(_present(said.outputs.logprobs_N))
    reference = [_reference_sum(trees[tree], k) for tree, k in said.owner_C]
    return policy_C, torch.tensor(reference, dtype=policy_C.dtype, device=policy_C.device)


def _pair_scores(trees: Sequence[Tree], said: Said) -> PairScores:
    scores_C = _present(said.outputs.scores_C)
    better_B, worse_B, weight_B, margin_B = _pairs(trees, said, scores_C)
    return PairScores(scores_C[better_B], scores_C[worse_B], margin_B, weight_B)


def _pairs(trees: Sequence[Tree], said: Said, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the better and the worse completion of every pair, its weight and its margin."""
    place = {owner: index for index, owner in enumerate(said.owner_C)}
    better, worse, weights, margins = [], [], [], []
    for index in dict.fromkeys(tree for tree, _ in said.owner_C):
        pairs = trees[index].pairs
        for i, j in pairs:
            better.append(place[index, i])
            worse.append(place[index, j])
            weights.append(1 / len(pairs))
            margins.append(trees[index].margin)
    rows = (torch.tensor(rows, dtype=torch.long, device=like.device) for rows in (better, worse))
    values = (torch.tensor(values, dtype=like.dtype, device=like.device) for values in (weights, margins))
    return *rows, *values  # type: ignore[return-value]


def _pair_weight(tree: Tree) -> float:
    return 1.0 if tree.pairs else 0.0


def _reference_sum(tree: Tree, branch: int) -> float:
    reference_L = tree.branches[branch].reference_L
    if reference_L is None:
        raise ValueError("This loss needs reference log-probabilities: see accord.engine.reference.")
    return float(np.sum(reference_L, dtype=np.float64))


def _present(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("This loss reads what is not there (log-probabilities, scores, or control branches).")
    return values


VIEWS: dict[type, View] = {
    TokenLogprobs: View(_tokens, _token_weight, couples_branches=False, kind="demonstrations", network=Policy),
    PreferenceLogprobs: View(
        _preferences, _pair_weight, couples_branches=True, kind="preferences", network=Policy, reference=True
    ),
    LabelledLogprobs: View(
        _labelled, _label_weight, couples_branches=False, kind="labels", network=Policy, reference=True
    ),
    ControlledLogprobs: View(
        _controlled, _label_weight, couples_branches=False, kind="labels", network=Policy, reference=True, controls=True
    ),
    PairScores: View(_pair_scores, _pair_weight, couples_branches=True, kind="preferences", network=RewardModel),
}
