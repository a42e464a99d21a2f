"""From what the network says of packed trees to the record that a loss reads, and the record's total weight.

The weight depends on the trees alone, so the denominator of a whole optimiser step is known before its first forward
pass: packing, accumulation and world size cannot change the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from accord.data.usable import Kind
from accord.losses.records import (
    ControlledLogprobs,
    LabelledLogprobs,
    PairLogprobs,
    PairScores,
    PreferenceLogprobs,
    RatingScores,
    Record,
    ReferencedRolloutTokens,
    RolloutTokens,
    TokenLogprobs,
    ValueTokens,
)
from accord.models.network import Critic, Network, Outputs, Policy, RewardModel
from accord.models.packing import MicroBatch
from accord.models.trees import FloatArray, Tree

__all__ = ["VIEWS", "Said", "View", "drift", "join", "merge", "predicted"]


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

    build: Callable[[Sequence[Tree], Said], Record]
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
    owners = [tuple((part.tree, k) for part in batch.parts for k in part.branches) for batch in batches]
    return merge([Said(o, batch.branch_N, said) for o, batch, said in zip(owners, batches, outputs, strict=True)])


def merge(parts: Sequence[Said]) -> Said:
    """Several parts as one, in their order."""
    owners: list[tuple[int, int]] = []
    branches: list[Tensor] = []
    for part in parts:
        branches.append(part.branch_N + len(owners))
        owners += part.owner_C
    named = [part.outputs.tensors() for part in parts]
    outputs = Outputs.of({name: torch.cat([tensors[name] for tensors in named]) for name in named[0]})
    return Said(tuple(owners), torch.cat(branches), outputs)


def _tokens(trees: Sequence[Tree], said: Said) -> TokenLogprobs:  # noqa: ARG001
    logprobs_N = _present(said.outputs.logprobs_N)
    return TokenLogprobs(logprobs_N, torch.ones_like(logprobs_N), said.outputs.statistics.get("mean_logprob"))


def _token_weight(tree: Tree) -> float:
    return float(sum(int(predicted(tree, k).sum()) for k in range(len(tree.branches))))


def _pair_logprobs(trees: Sequence[Tree], said: Said) -> PairLogprobs:
    policy_C = said.completion_sums(_present(said.outputs.logprobs_N))
    # At least one, so that a mean over no token is zero.
    lengths = [max(1, int(predicted(trees[tree], k).sum())) for tree, k in said.owner_C]
    length_C = torch.tensor(lengths, dtype=policy_C.dtype, device=policy_C.device)
    better_B, worse_B, weight_B, _ = _pairs(trees, said, policy_C)
    return PairLogprobs(
        chosen_B=policy_C[better_B],
        rejected_B=policy_C[worse_B],
        chosen_length_B=length_C[better_B],
        rejected_length_B=length_C[worse_B],
        weight_B=weight_B,
    )


def _preferences(trees: Sequence[Tree], said: Said) -> PreferenceLogprobs:
    policy = _pair_logprobs(trees, said)
    _, reference_C = _policy_and_reference(trees, said)
    better_B, worse_B, _, _ = _pairs(trees, said, torch.empty(0))
    squares_N = said.outputs.statistics.get("log_sum_squares")
    squares_C = said.completion_sums(squares_N) if squares_N is not None else None
    return PreferenceLogprobs(
        chosen_B=policy.chosen_B,
        rejected_B=policy.rejected_B,
        chosen_length_B=policy.chosen_length_B,
        rejected_length_B=policy.rejected_length_B,
        weight_B=policy.weight_B,
        ref_chosen_B=reference_C[better_B],
        ref_rejected_B=reference_C[worse_B],
        chosen_tail_B=_tails(trees, said, better_B, worse_B),
        rejected_tail_B=_tails(trees, said, worse_B, better_B),
        chosen_log_sum_squares_B=None if squares_C is None else squares_C[better_B],
        rejected_log_sum_squares_B=None if squares_C is None else squares_C[worse_B],
    )


def predicted(tree: Tree, branch: int) -> npt.NDArray[np.bool_]:
    """Which tokens of a branch carry loss; without a prompt, nothing predicts the first one."""
    mask_L = tree.branches[branch].loss_mask_L.copy()
    mask_L[0] &= len(tree.prompt_P) > 0
    return mask_L


def _tails(trees: Sequence[Tree], said: Said, mine_B: Tensor, other_B: Tensor) -> Tensor:
    """Of each pair's `mine`, the log-ratio of policy to reference in tokens beyond the length of `other`: [B]."""
    logprobs_N = _present(said.outputs.logprobs_N)
    reference = [_reference(trees[tree], k)[predicted(trees[tree], k)] for tree, k in said.owner_C]
    ratio_N = logprobs_N - torch.from_numpy(np.concatenate(reference)).to(logprobs_N)
    length_C = [len(values) for values in reference]
    end_C = np.cumsum(length_C)
    tokens: list[int] = []
    pairs: list[int] = []
    for pair, (mine, other) in enumerate(zip(mine_B.tolist(), other_B.tolist(), strict=True)):
        beyond = range(end_C[mine] - max(0, length_C[mine] - length_C[other]), end_C[mine])
        tokens += beyond
        pairs += [pair] * len(beyond)
    rows = torch.tensor([pairs, tokens], dtype=torch.long, device=ratio_N.device)
    return ratio_N.new_zeros(len(mine_B)).index_add(0, rows[0], ratio_N[rows[1]])


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
    reference = [float(np.sum(_reference(trees[tree], k), dtype=np.float64)) for tree, k in said.owner_C]
    return policy_C, torch.tensor(reference, dtype=policy_C.dtype, device=policy_C.device)


def _pair_scores(trees: Sequence[Tree], said: Said) -> PairScores:
    scores_C = _present(said.outputs.scores_C)
    better_B, worse_B, weight_B, margin_B = _pairs(trees, said, scores_C)
    owners = [said.owner_C[index][0] for index in better_B.tolist()]
    probability_B = torch.tensor([trees[tree].probability for tree in owners]).to(scores_C)
    return PairScores(scores_C[better_B], scores_C[worse_B], margin_B, probability_B, weight_B)


def _rating_scores(trees: Sequence[Tree], said: Said) -> RatingScores:
    scores_CA = _present(said.outputs.statistics.get("ratings"))
    rows = [
        (completion, attribute, rating)
        for completion, (tree, k) in enumerate(said.owner_C)
        for attribute, rating in enumerate(trees[tree].ratings[k])
        if rating is not None
    ]
    completion_R, attribute_R, ratings = zip(*rows, strict=True) if rows else ((), (), ())
    targets_R = torch.tensor(ratings).to(scores_CA)
    return RatingScores(scores_CA[list(completion_R), list(attribute_R)], targets_R, torch.ones_like(targets_R))


def _rating_weight(tree: Tree) -> float:
    return float(sum(rating is not None for ratings in tree.ratings for rating in ratings))


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


def _rollouts(trees: Sequence[Tree], said: Said) -> RolloutTokens:
    logprobs_N, statistics = _present(said.outputs.logprobs_N), said.outputs.statistics
    sampled_N = _column(trees, said, "behaviour_L", logprobs_N)
    return RolloutTokens(
        logprobs_N=logprobs_N,
        behaviour_N=logprobs_N.detach() if sampled_N is None else sampled_N,
        advantage_N=_carried(trees, said, "advantage_L", logprobs_N),
        weight_N=_weights(trees, said, logprobs_N),
        completion_N=said.branch_N,
        completions=len(said.owner_C),
        reference_N=_column(trees, said, "reference_L", logprobs_N),
        entropy_N=statistics.get("entropy", statistics.get("constant_entropy")),
        values_N=statistics.get("values"),
        old_values_N=_column(trees, said, "value_L", logprobs_N),
        returns_N=_column(trees, said, "return_L", logprobs_N),
    )


def _referenced(trees: Sequence[Tree], said: Said) -> ReferencedRolloutTokens:
    rows = _rollouts(trees, said)
    _carried(trees, said, "reference_L", rows.logprobs_N)
    return ReferencedRolloutTokens(**{field.name: getattr(rows, field.name) for field in fields(rows)})


def _values(trees: Sequence[Tree], said: Said) -> ValueTokens:
    values_N = _present(said.outputs.statistics.get("values"))
    old_values_N, returns_N = (_carried(trees, said, name, values_N) for name in ("value_L", "return_L"))
    return ValueTokens(values_N, old_values_N, returns_N, _weights(trees, said, values_N))


def _token_weights(tree: Tree, branch: int) -> FloatArray:
    weight_L = tree.branches[branch].weight_L
    return np.ones(len(tree.branches[branch].tokens_L), np.float32) if weight_L is None else weight_L


def _weights(trees: Sequence[Tree], said: Said, like: Tensor) -> Tensor:
    return _join([_token_weights(trees[tree], k)[predicted(trees[tree], k)] for tree, k in said.owner_C], like)


def _rollout_weight(tree: Tree) -> float:
    return float(sum(_token_weights(tree, k)[predicted(tree, k)].sum(dtype=float) for k in range(len(tree.branches))))


def _column(trees: Sequence[Tree], said: Said, name: str, like: Tensor) -> Tensor | None:
    """What the branches carry under this name, of every loss token: [N], or None if they carry none."""
    found = [getattr(trees[tree].branches[k], name) for tree, k in said.owner_C]
    if any(values_L is None for values_L in found):
        return None
    masks = [predicted(trees[tree], k) for tree, k in said.owner_C]
    return _join([values_L[mask_L] for values_L, mask_L in zip(found, masks, strict=True)], like)


def _carried(trees: Sequence[Tree], said: Said, name: str, like: Tensor) -> Tensor:
    column_N = _column(trees, said, name, like)
    if column_N is None:
        raise ValueError(f"This loss needs {name} of every branch (accord.models.trees.Branch).")
    return column_N


def _join(parts: Sequence[FloatArray], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(like)


def _reference(tree: Tree, branch: int) -> FloatArray:
    reference_L = tree.branches[branch].reference_L
    if reference_L is None:
        raise ValueError("This loss needs reference log-probabilities: see accord.engine.reference.")
    return reference_L


def _present(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("This loss reads what is not there (log-probabilities, scores, or control branches).")
    return values


VIEWS: dict[type, View] = {
    TokenLogprobs: View(_tokens, _token_weight, couples_branches=False, kind="demonstrations", network=Policy),
    PairLogprobs: View(_pair_logprobs, _pair_weight, couples_branches=True, kind="preferences", network=Policy),
    PreferenceLogprobs: View(
        _preferences, _pair_weight, couples_branches=True, kind="preferences", network=Policy, reference=True
    ),
    LabelledLogprobs: View(
        _labelled, _label_weight, couples_branches=False, kind="labels", network=Policy, reference=True
    ),
    ControlledLogprobs: View(
        _controlled, _label_weight, couples_branches=False, kind="labels", network=Policy, reference=True, controls=True
    ),
    RatingScores: View(_rating_scores, _rating_weight, couples_branches=False, kind="ratings", network=RewardModel),
    PairScores: View(_pair_scores, _pair_weight, couples_branches=True, kind="preferences", network=RewardModel),
    RolloutTokens: View(_rollouts, _rollout_weight, couples_branches=False, kind="prompts", network=Policy),
    ReferencedRolloutTokens: View(
        _referenced, _rollout_weight, couples_branches=False, kind="prompts", network=Policy, reference=True
    ),
    ValueTokens: View(_values, _rollout_weight, couples_branches=False, kind="prompts", network=Critic),
}
