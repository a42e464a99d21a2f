"""Control branches: what the policy says of completions that do not belong to the prompt.

KTO measures rewards from how far the policy has moved on unrelated completions (Ethayarajh et al. 2024, §4.1). Which
completion is whose control is drawn once over the whole data set, so it does not depend on how batches are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from accord.errors import DataError
from accord.models.trees import Branch, Tree

__all__ = ["control_tree", "with_controls"]


def with_controls(trees: Sequence[Tree], seed: int, max_tokens: int) -> list[Tree]:
    """The same trees with as many control branches as branches.

    Each branch of the data set is the control of one branch of another prompt (of several, only where one prompt holds
    more than half of all branches).

    Args:
        seed: decides which is whose.
        max_tokens: longest prompt with completion; a longer control loses its end.

    Raises:
        DataError: there is only one prompt.
    """
    order = np.random.default_rng(seed).permutation(len(trees))
    deck = [branch for index in order for branch in trees[index].branches]
    if len(trees) < 2:
        fix = "Give rows with at least two different prompts, or take a loss without controls (apo_zero_unpaired, bco)."
        raise DataError("Every row has the same prompt, so none has a completion of another prompt.", fix=fix)
    # In a deck of the trees' branches side by side, a turn by the size of the largest tree leaves no tree on itself.
    shift = max(len(tree.branches) for tree in trees)
    result = list(trees)
    start = 0
    for index in order:
        tree = trees[index]
        size = len(tree.branches)
        others = len(deck) - size
        places = [(start + size + (shift - size + k) % others) % len(deck) for k in range(size)]
        room = max_tokens - len(tree.prompt_P)
        result[index] = replace(tree, controls=tuple(_control(deck[place], room) for place in places))
        start += size
    return result


def control_tree(tree: Tree) -> Tree:
    """The prompt with its control branches alone."""
    if not tree.controls:
        raise ValueError("This tree has no control branches: see with_controls.")
    return Tree(tree.prompt_P, tree.controls, source=tree.source)


def _control(branch: Branch, room: int) -> Branch:
    first = int(np.argmax(branch.loss_mask_L))  # what stands before it belongs to the other prompt
    kept = slice(first, first + room)
    return Branch(branch.tokens_L[kept], branch.loss_mask_L[kept])
