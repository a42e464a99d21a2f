"""Tiny networks of known weights, random trees, and the gradient that an engine leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from accord.engine.engine import Engine, EngineConfig
from accord.losses import LOSSES, BoundLoss
from accord.models.load import load_policy, load_reward_model
from accord.models.network import Network
from accord.models.tiny import save_tiny, tiny_model, tiny_tokenizer
from accord.models.trees import Branch, Tree

# Threads cost more than they bring where the models are tiny, most of all when tests run on every core.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_directory("llama", reward=False, seed=0)`: a saved model; a reward model has a random score head."""
    made: dict[tuple[str, bool, int], Path] = {}

    def make(architecture: str = "llama", *, reward: bool = False, seed: int = 0) -> Path:
        key = architecture, reward, seed
        if key not in made:
            directory = tmp_path_factory.mktemp(architecture) / "model"
            if reward:
                config = tiny_model(architecture).config
                config.num_labels, config.pad_token_id = 1, 0
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = transformers.AutoModelForSequenceClassification.from_config(config)
                model.save_pretrained(directory)
                tiny_tokenizer().save_pretrained(directory)
            else:
                save_tiny(directory, architecture, seed=seed)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def network(tiny_directory: Any) -> Callable[..., Network]:
    """`network("llama", reward=False, seed=0)`: a new network each time, so that tests may change its weights."""

    def make(architecture: str = "llama", *, reward: bool = False, seed: int = 0) -> Network:
        directory = str(tiny_directory(architecture, reward=reward, seed=seed))
        return (load_reward_model if reward else load_policy)(directory, device=torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def pair_tree() -> Callable[..., Tree]:
    """`pair_tree(rng, prompt=5, lengths=(3, 4))`: random tokens with random reference log-probabilities."""

    def make(rng: np.random.Generator, prompt: int, lengths: Sequence[int], **fields: Any) -> Tree:
        branches = []
        for length in lengths:
            mask = rng.random(length) < 0.8
            mask[-1] = True
            reference = np.where(mask, -5 * rng.random(length), 0).astype(np.float32)
            branches.append(Branch(rng.integers(3, 259, length), mask, reference))
        tree = Tree(rng.integers(3, 259, prompt), tuple(branches), ranks=tuple(range(len(lengths))))
        return replace(tree, **fields)

    return make


@pytest.fixture(scope="session")
def some_trees(pair_tree: Any) -> list[Tree]:
    """Five pairs of different lengths, two with a margin."""
    rng = np.random.default_rng(11)
    shapes = [(9, (5, 7)), (3, (12, 2)), (20, (4, 4)), (1, (6, 9)), (14, (3, 11))]
    return [
        pair_tree(rng, prompt, lengths, margin=0.25 * (index % 3)) for index, (prompt, lengths) in enumerate(shapes)
    ]


def bind(name: str, **settings: Any) -> BoundLoss:
    return LOSSES[name].bind(settings)


@pytest.fixture(scope="session")
def bound() -> Callable[..., BoundLoss]:
    """`bound("dpo", beta=0.2)`."""
    return bind


@pytest.fixture(scope="session")
def step() -> Callable[..., tuple[dict[str, float], dict[str, Tensor]]]:
    """Metrics of one `forward_backward` in float32, and every parameter's gradient."""

    def run(
        network: Network, trees: Sequence[Tree], loss: BoundLoss, *, tokens: int = 4096, passes: Any = "auto"
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        network.model.zero_grad()
        engine = Engine(network, EngineConfig(precision="float32", micro_batch_tokens=tokens))
        metrics = engine.forward_backward(trees, loss, passes)
        return metrics, {n: p.grad.clone() for n, p in network.model.named_parameters() if p.grad is not None}

    return run


@pytest.fixture(scope="session")
def assert_close_gradients() -> Callable[..., None]:
    """Each gradient within `rtol` of its norm; one that is zero by mathematics, within a millionth of the whole."""

    def check(gradients: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
        assert gradients.keys() == expected.keys()
        whole = float(torch.stack([g.norm() for g in expected.values()]).norm())
        assert whole > 0
        for name, gradient in gradients.items():
            error, size = float((gradient - expected[name]).norm()), float(expected[name].norm())
            assert error <= rtol * size + 1e-6 * whole, f"{name}: {error} of {size}"

    return check
