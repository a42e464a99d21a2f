"""The cache of reference log-probabilities: what hits, what misses, and what the reference of an adapter is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord.engine.engine import Engine, EngineConfig
from accord.engine.reference import attach_reference
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Network
from accord.models.trees import Branch, Tree

FLOAT32 = EngineConfig(precision="float32")


def attach(network: Network, trees: Sequence[Tree], cache: Path, config: EngineConfig = FLOAT32) -> tuple[Any, int]:
    """The trees with references, and how many of their tokens had to be computed."""
    seen: list[tuple[int, int]] = []
    attached = attach_reference(Engine(network, config), trees, cache, lambda *counts: seen.append(counts))
    assert sum(count for count, _ in seen) == len(trees)
    return attached, sum(tokens for _, tokens in seen)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "reference.sqlite"


@pytest.fixture
def trees(some_trees: list[Tree]) -> list[Tree]:
    """Without references of their own."""
    return [replace(t, branches=tuple(replace(b, reference_L=None) for b in t.branches)) for t in some_trees]


def test_references_are_the_networks_own_log_probabilities(network: Any, trees: list[Tree], cache: Path) -> None:
    model = network()
    attached, tokens = attach(model, trees, cache)
    assert tokens == sum(map(len, trees))
    expected = Engine(model, FLOAT32).forward(trees)
    for tree, answer in zip(attached, expected, strict=True):
        for branch, values in zip(tree.branches, answer, strict=True):
            assert branch.reference_L is not None
            np.testing.assert_allclose(branch.reference_L, values, atol=1e-5)
            assert (branch.reference_L[~branch.loss_mask_L] == 0).all()


def test_a_second_call_computes_nothing(
    network: Any, trees: list[Tree], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = attach(network(), trees, cache)
    monkeypatch.setattr(Engine, "forward", lambda *_: pytest.fail("computed again"))
    second, tokens = attach(network(), list(reversed(trees)), cache)
    assert tokens == 0
    for one, other in zip(first, reversed(second), strict=True):
        for a, b in zip(one.branches, other.branches, strict=True):
            np.testing.assert_array_equal(a.reference_L, b.reference_L)


def test_more_data_computes_the_new_rows_only(network: Any, trees: list[Tree], cache: Path) -> None:
    attach(network(), trees[:3], cache)
    assert attach(network(), trees, cache)[1] == sum(map(len, trees[3:]))


def test_the_same_row_twice_is_computed_once(network: Any, trees: list[Tree], cache: Path) -> None:
    attached, tokens = attach(network(), [trees[0], trees[0]], cache)
    assert tokens == len(trees[0])
    assert all(branch.reference_L is not None for tree in attached for branch in tree.branches)


def changed_token(tree: Tree) -> Tree:
    first, second = tree.branches
    tokens = second.tokens_L.copy()
    tokens[0] = (tokens[0] + 1) % 250
    return replace(tree, branches=(first, replace(second, tokens_L=tokens)))


def changed_mask(tree: Tree) -> Tree:
    first, second = tree.branches
    mask = first.loss_mask_L.copy()
    mask[0] = ~mask[0]
    return replace(tree, branches=(replace(first, loss_mask_L=mask), second))


def moved_boundary(tree: Tree) -> Tree:
    """One token moves from the prompt into both branches: the same text, another boundary."""
    branches = tuple(
        Branch(np.append(tree.prompt_P[-1:], b.tokens_L), np.append([False], b.loss_mask_L)) for b in tree.branches
    )
    return replace(tree, prompt_P=tree.prompt_P[:-1], branches=branches)


@pytest.mark.parametrize("change", [changed_token, changed_mask, moved_boundary])
def test_a_changed_sample_misses(change: Any, network: Any, trees: list[Tree], cache: Path) -> None:
    attach(network(), trees, cache)
    other = change(trees[2])
    assert attach(network(), [other], cache)[1] == len(other)


def test_a_changed_weight_template_or_precision_misses(network: Any, trees: list[Tree], cache: Path) -> None:
    whole = sum(map(len, trees))
    attach(network(), trees, cache)
    model = network()
    with torch.no_grad():
        model.trainable()[-1].view(-1)[0] += 1e-4
    assert attach(model, trees, cache)[1] == whole
    model = network()
    model.tokenizer.chat_template += " "
    assert attach(model, trees, cache)[1] == whole
    assert attach(network(), trees, cache, EngineConfig(precision="bfloat16"))[1] == whole
    assert attach(network(), trees, cache)[1] == 0


def test_ranks_and_micro_batches_do_not_miss(network: Any, trees: list[Tree], cache: Path) -> None:
    """They change nothing of what the reference says."""
    attach(network(), trees, cache)
    other = [replace(tree, ranks=(1, 0), margin=9.0) for tree in trees]
    assert attach(network(), other, cache, EngineConfig(precision="float32", micro_batch_tokens=20))[1] == 0


def test_the_reference_of_an_adapter_is_its_base(network: Any, trees: list[Tree], cache: Path) -> None:
    """With adapters that have moved, the reference still is the base's, and the base's cache entry serves it."""
    base, _ = attach(network(), trees, cache)
    model = network()
    add_lora(model, LoRAConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.05)
    assert attach(model, trees, cache)[1] == 0
    computed, tokens = attach(model, trees, cache.with_name("other.sqlite"))
    assert tokens == sum(map(len, trees))
    for one, other in zip(base, computed, strict=True):
        for a, b in zip(one.branches, other.branches, strict=True):
            np.testing.assert_allclose(a.reference_L, b.reference_L, atol=1e-5)
    moved = Engine(model, FLOAT32).forward(trees)
    assert np.abs(np.concatenate(moved[0]) - np.concatenate([b.reference_L for b in base[0].branches])).max() > 0.01
