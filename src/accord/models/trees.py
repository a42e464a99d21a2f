"""Prompt trees: one prompt with the K completions that branch off it. Every training example is one.

SFT and KTO: K = 1. DPO: K = 2. Reward model: K = 2…9, a ranking. GRPO, RLOO, best-of-n: K = group size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from accord.types import Source

__all__ = ["Branch", "FloatArray", "IntArray", "Tree", "share_prompts", "with_reference"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One completion. L = its tokens.

    Example: ``Branch(np.array([21187, 2]), np.array([True, True]))``
    """

    tokens_L: IntArray
    loss_mask_L: npt.NDArray[np.bool_]
    """Which tokens carry loss."""
    reference_L: FloatArray | None = None
    """Log-probabilities under the reference model in nats; zero where `loss_mask_L` is false."""
    truncated: bool = False
    behaviour_L: FloatArray | None = None
    """A rollout: log-probabilities in nats of the policy that sampled it, against which ratios are taken (default: of
    the policy that learns from it, so that ratios are 1)."""
    advantage_L: FloatArray | None = None
    """A rollout: how much better each token is than what was expected (`accord.advantages`)."""
    weight_L: FloatArray | None = None
    """A rollout: weight of each token in the step's loss (default: 1)."""
    value_L: FloatArray | None = None
    """A rollout: what the critic expected before each token when it was sampled, in units of reward."""
    return_L: FloatArray | None = None
    """A rollout: what the critic should have expected."""


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A prompt, its branches, and their order of preference (0 best, equal ranks are a tie).

    Example: ``Tree(np.array([1, 4093, 198]), (chosen, rejected), ranks=(0, 1))``
    """

    prompt_P: IntArray
    branches: tuple[Branch, ...]
    ranks: tuple[int, ...] = (0,)
    margin: float = 0.0
    """How much better the best is than the worst, in units of reward, where the data says so."""
    source: Source | None = None
    probability: float = 1.0
    """How probable it is that the order of preference is right, where the data says so."""
    ratings: tuple[tuple[float | None, ...], ...] = ()
    """For every branch a standardised rating of each of the reward model's attributes, None where the data has none."""
    labels: tuple[bool, ...] = ()
    """A thumb up or down for every branch, where the data has labels instead of an order."""
    controls: tuple[Branch, ...] = ()
    """Completions of other prompts (`accord.models.controls`): log-probabilities are wanted, gradients are not."""

    def __len__(self) -> int:
        """Unique tokens: the prompt once, and every completion; controls are not counted."""
        return len(self.prompt_P) + sum(len(branch.tokens_L) for branch in self.branches)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (better, worse) pair of branches; ties give none."""
        order = range(len(self.branches))
        return tuple((i, j) for i in order for j in order if self.ranks[i] < self.ranks[j])

    def digest(self) -> str:
        """A hash of every token and every mask of prompt and branches: the key of whatever is computed from them."""
        state = hashlib.blake2b(digest_size=16)
        for part in (self.prompt_P, *(array for b in self.branches for array in (b.tokens_L, b.loss_mask_L))):
            state.update(len(part).to_bytes(8, "little"))
            state.update(np.ascontiguousarray(part).tobytes())
        return state.hexdigest()


def share_prompts(trees: Sequence[Tree]) -> list[Tree]:
    """Labelled trees of the same prompt as one tree, in the place of the first: the prompt is then computed once."""
    groups: dict[bytes, list[Tree]] = {}
    for tree in trees:
        groups.setdefault(tree.prompt_P.tobytes(), []).append(tree)
    return [
        replace(
            group[0],
            branches=tuple(branch for tree in group for branch in tree.branches),
            ranks=tuple(rank for tree in group for rank in tree.ranks),
            labels=tuple(label for tree in group for label in tree.labels),
        )
        for group in groups.values()
    ]


def with_reference(tree: Tree, reference: Sequence[FloatArray]) -> Tree:
    """The same tree with reference log-probabilities, one array per branch."""
    branches = tuple(
        replace(branch, reference_L=values) for branch, values in zip(tree.branches, reference, strict=True)
    )
    return replace(tree, branches=branches)
