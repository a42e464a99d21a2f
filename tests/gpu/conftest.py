"""Tests of this folder need CUDA: each is the twin of a test on the CPU, and is skipped where there is no device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord.models.load import load_policy, load_reward_model
from accord.models.network import Network
from accord.models.tiny import save_tiny
from accord.models.trees import Branch, Tree

Both = tuple[Network, Network]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and torch sees no device"))


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., Both]:
    """`both("llama", reward=False)`: the same new network on the CPU and on the first CUDA device."""

    def make(architecture: str, *, reward: bool = False, **settings: Any) -> Both:
        # FlexAttention wants heads of at least 16.
        wide = {"n_embd": 64} if architecture == "gpt2" else {"hidden_size": 64}
        head = {"head_dim": 16} if architecture in ("qwen3", "gemma", "gemma2") else {}
        directory = save_tiny(tmp_path / architecture, architecture, **wide, **head, **settings)
        load = load_reward_model if reward else load_policy
        first, second = (load(str(directory), device=torch.device(name)) for name in ("cpu", "cuda"))
        if reward:
            with torch.no_grad():  # zero at first, and then nothing would reach the body
                first.head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
                second.head.weight.copy_(first.head.weight)
        return first, second

    return make


@pytest.fixture(scope="session")
def trees() -> list[Tree]:
    """Pairs with prompts of 1 … 150 tokens, some beyond a block of FlexAttention (128), some beyond a tiny window."""
    rng = np.random.default_rng(11)
    shapes = [(9, (5, 7)), (150, (140, 20)), (20, (4, 4)), (1, (6, 9)), (14, (3, 11))]
    made = []
    for prompt, lengths in shapes:
        branches = []
        for length in lengths:
            mask = rng.random(length) < 0.8
            mask[-1] = True
            reference = np.where(mask, -5 * rng.random(length), 0).astype(np.float32)
            branches.append(Branch(rng.integers(3, 259, length), mask, reference))
        made.append(Tree(rng.integers(3, 259, prompt), tuple(branches), ranks=(0, 1)))
    return made
