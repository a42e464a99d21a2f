"""Prompt trees to packed micro-batches: no padding between them, no token computed twice.

T = packed tokens, N = tokens that carry loss, C = completions (branches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from accord.models.trees import IntArray, Tree

__all__ = ["MicroBatch", "Part", "Span", "TreeLayout", "pack", "pack_one"]

_ROUND = 32
"""Packed lengths are rounded up to a multiple of this. oneDNN prepares its kernels anew for every new shape, which
costs more than the few idle rows."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some branches of one tree of a batch: `tree` is its index, `branches` theirs."""

    tree: int
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """`length` rows of a packed row, from `start`."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """Where one tree stands in a packed row: its prompt, then its branches, without a gap."""

    prompt: Span
    branches: tuple[Span, ...]


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Trees packed into one row, and the rows that the losses need."""

    input_ids_T: Tensor
    positions_T: Tensor
    layout: tuple[TreeLayout, ...]
    parts: tuple[Part, ...]
    predictor_N: Tensor
    """Row whose hidden state predicts loss token n (for a branch's first token: the prompt's last row)."""
    target_N: Tensor
    branch_N: Tensor
    """Which completion of this micro-batch (0 … C-1) loss token n belongs to."""
    last_C: Tensor
    """Row of the last token of every completion: where a reward model reads its score."""
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    """Attention masks by shape, shared by all layers."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        names = ("input_ids_T", "positions_T", "predictor_N", "target_N", "branch_N", "last_C")
        return replace(self, masks={}, **{name: getattr(self, name).to(device) for name in names})


def pack(
    trees: Sequence[Tree], budget: int, *, branching: bool = True, indices: Sequence[int] | None = None
) -> list[MicroBatch]:
    """Pack trees into micro-batches of at most `budget` unique tokens, first fit by falling size.

    A tree that is larger than the budget is cut into parts, each with the whole prompt and some branches; a single
    branch is never cut, so one that is too long stands alone. With `branching=False` (models whose attention cannot
    branch) every part holds one branch and every micro-batch one part. `indices` picks trees; parts name them by their
    place in `trees`.
    """
    parts = [
        part
        for index in (range(len(trees)) if indices is None else indices)
        for part in _parts(index, trees[index], budget if branching else 0)
    ]
    if not branching:
        return [pack_one([part], trees) for part in parts]
    sizes = {part: _size(part, trees) for part in parts}
    bins: list[list[Part]] = []
    room: list[int] = []
    for part in sorted(parts, key=lambda part: -sizes[part]):
        where = next((i for i, free in enumerate(room) if free >= sizes[part]), None)
        if where is None:
            bins.append([part])
            room.append(budget - sizes[part])
        else:
            bins[where].append(part)
            room[where] -= sizes[part]
    return [pack_one(members, trees) for members in bins]


def pack_one(parts: Sequence[Part], trees: Sequence[Tree]) -> MicroBatch:
    """Lay parts of trees into one packed row, in the order given."""
    ids: list[IntArray] = []
    positions: list[IntArray] = []
    predictors: list[IntArray] = []
    targets: list[IntArray] = []
    owners: list[IntArray] = []
    lasts: list[int] = []
    layout: list[TreeLayout] = []
    row, completion = 0, 0
    for part in parts:
        tree = trees[part.tree]
        prompt = Span(row, len(tree.prompt_P))
        ids.append(tree.prompt_P)
        positions.append(np.arange(prompt.length))
        row += prompt.length
        spans = []
        for index in part.branches:
            branch = tree.branches[index]
            length = len(branch.tokens_L)
            spans.append(Span(row, length))
            ids.append(branch.tokens_L)
            positions.append(prompt.length + np.arange(length))
            before = np.arange(row - 1, row + length - 1)
            before[0] = prompt.start + prompt.length - 1
            mask = branch.loss_mask_L.copy()
            mask[0] &= prompt.length > 0
            predictors.append(before[mask])
            targets.append(branch.tokens_L[mask])
            owners.append(np.full(int(mask.sum()), completion))
            row += length
            completion += 1
            lasts.append(row - 1)
        layout.append(TreeLayout(prompt, tuple(spans)))
    idle = -row % _ROUND
    if idle:
        layout.append(TreeLayout(Span(row, idle), ()))
        ids.append(np.zeros(idle, dtype=np.int64))
        positions.append(np.zeros(idle, dtype=np.int64))
    return MicroBatch(
        input_ids_T=_tensor(ids),
        positions_T=_tensor(positions),
        layout=tuple(layout),
        parts=tuple(parts),
        predictor_N=_tensor(predictors),
        target_N=_tensor(targets),
        branch_N=_tensor(owners),
        last_C=torch.tensor(lasts, dtype=torch.long),
    )


def _parts(index: int, tree: Tree, budget: int) -> list[Part]:
    groups: list[list[int]] = []
    used = 0
    for k, branch in enumerate(tree.branches):
        length = len(branch.tokens_L)
        if groups and used + length <= budget:
            groups[-1].append(k)
            used += length
        else:
            groups.append([k])
            used = len(tree.prompt_P) + length
    return [Part(index, tuple(group)) for group in groups]


def _size(part: Part, trees: Sequence[Tree]) -> int:
    tree = trees[part.tree]
    return len(tree.prompt_P) + sum(len(tree.branches[k].tokens_L) for k in part.branches)


def _tensor(columns: list[IntArray]) -> Tensor:
    return torch.from_numpy(np.concatenate(columns)) if columns else torch.zeros(0, dtype=torch.long)
