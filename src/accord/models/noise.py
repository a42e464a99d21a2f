"""NEFTune (Jain et al. 2024, algorithm 1): uniform noise on the input embeddings, which makes answers less of a copy.

L = tokens of an example, prompt and completion; d = width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from accord.models.packing import MicroBatch

__all__ = ["embedding_noise"]


@contextmanager
def embedding_noise(model: Any, batch: MicroBatch, alpha: float) -> Iterator[None]:
    """While this runs, `model` adds α/√(L·d)·ε to the embeddings of `batch`, ε uniform in [−1, 1].

    ε is drawn for every example from the step's seed and its place in the step, so the numbers depend neither on
    packing nor on whether the loss takes one pass or two. Examples have one completion: a prompt that several share
    would have no length of its own.
    """

    def add(module: Any, inputs: Any, output_BTD: Tensor) -> Tensor:  # noqa: ARG001
        noise_TD = torch.zeros(output_BTD.shape[1:])
        generator = torch.Generator()
        for part, tree in zip(batch.parts, batch.layout, strict=False):  # idle rows belong to no part
            length = tree.prompt.length + tree.branches[0].length
            generator.manual_seed(hash((torch.initial_seed(), part.tree)) & ((1 << 63) - 1))
            drawn_LD = 2 * torch.rand(length, noise_TD.shape[1], generator=generator) - 1
            noise_TD[tree.prompt.start :][:length] = alpha / drawn_LD.numel() ** 0.5 * drawn_LD
        return output_BTD + noise_TD.to(output_BTD)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
