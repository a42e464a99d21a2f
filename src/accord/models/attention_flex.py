"""Branch attention on CUDA: FlexAttention (Dong et al. 2024) with a block mask built from the packed layout.

The same numbers as the products of `accord.models.attention`, without a loop over segments: blocks of which nothing is
visible are skipped, and no attention weight is kept for backward. On a CPU FlexAttention has no backward pass, so there
it serves tests alone.

T = packed tokens, H = query heads, K = key/value heads, D = head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from accord.models.packing import MicroBatch

__all__ = ["attend", "block_mask"]

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: MicroBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention over a packed row: query [H, T, D], key and value [K, T, D] to [T, H, D]."""
    masks = cast("dict[tuple[object, ...], BlockMask]", batch.masks)
    if (window,) not in masks:
        masks[window,] = block_mask(batch, window, query.device)
    flex = _compiled() if query.is_cuda else flex_attention
    attended: Tensor = flex(
        query[None],
        key[None],
        value[None],
        score_mod=_capped(softcap) if softcap is not None else None,
        block_mask=masks[window,],
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return attended[0].transpose(0, 1)


def block_mask(batch: MicroBatch, window: int | None, device: torch.device) -> BlockMask:
    """Which keys a row sees: those of its own segment and of its tree's prompt, up to its own position.

    The idle rows at the end are a segment of their own, which nobody else sees.
    """
    owner_T, prompt_T = (column.to(device) for column in _segments(batch))
    position_T = batch.positions_T.to(device)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:  # noqa: ARG001
        related = (owner_T[column] == owner_T[row]) | (owner_T[column] == prompt_T[row])
        distance = position_T[row] - position_T[column]
        seen = related & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    length = len(position_T)
    return create_block_mask(visible, None, None, length, length, device=device)


def _segments(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """For every row: the number of its segment, and that of its tree's prompt."""
    numbers: list[int] = []
    prompts: list[int] = []
    lengths: list[int] = []
    for tree in batch.layout:
        first = len(numbers)
        for span in (tree.prompt, *tree.branches):
            numbers.append(len(numbers))
            prompts.append(first)
            lengths.append(span.length)
    repeats = torch.tensor(lengths)
    return torch.tensor(numbers).repeat_interleave(repeats), torch.tensor(prompts).repeat_interleave(repeats)


@cache
def _capped(softcap: float) -> Score:
    """One function per cap: FlexAttention compiles a kernel for each function that it meets."""

    def cap(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:  # noqa: ARG001
        return softcap * torch.tanh(score / softcap)

    return cap


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
