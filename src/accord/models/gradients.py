"""Gradients of a table of token vectors [V, D] (the embedding, the head), added to `.grad` where they belong.

Autograd would build each as a dense float32 matrix, nearly all zeros for the embedding, and then add it up. With
49,152 tokens of 576 numbers that is 113 MB several times a step, and blocks of that size tear holes into the heap.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["gradient_sum"]


def gradient_sum(table_VD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where to add the gradient of a table, and what a backward function returns for it.

    Returns:
        A parameter's own `.grad` (made of zeros if there is none) and None, since nothing is left to do; for any other
        tensor new zeros [V, D] float32, twice: autograd carries them on.
    """
    if not isinstance(table_VD, nn.Parameter):
        zeros = torch.zeros_like(table_VD, dtype=torch.float32)
        return zeros, zeros
    if table_VD.grad is None:
        table_VD.grad = torch.zeros_like(table_VD)
    return table_VD.grad, None
