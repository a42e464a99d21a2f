"""Every loss of the registry on the engine: packing, passes and the pieces of a record that are not plain sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from accord.engine.engine import Engine, EngineConfig
from accord.engine.views import VIEWS
from accord.losses import LOSSES
from accord.models.network import Policy
from accord.models.trees import Tree

MIXTURE = {"parts": {"dpo": {"weight": 0.5, "wpo": True}, "simpo": {"weight": 2}}}
CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {})
        for name in LOSSES
        if VIEWS[LOSSES[name].inputs].network is Policy
        and VIEWS[LOSSES[name].inputs].kind in ("demonstrations", "preferences")
        and name != "mixture"
    ),
    ("mixture", MIXTURE),
    ("sft", {"label_smoothing": 0.3}),
    ("dpo", {"wpo": True, "ld_alpha": 0.3, "sft_weight": 0.5}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_packing_and_passes_change_nothing(
    name: str,
    settings: dict[str, Any],
    network: Any,
    some_trees: list[Tree],
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
) -> None:
    """One micro-batch in one pass, in two passes, and cut into single branches."""
    model, loss = network(), bound(name, **settings)
    expected = step(model, some_trees, loss, passes="one")
    for tokens, passes in ((4096, "two"), (40, "auto"), (1, "auto")):
        metrics, gradients = step(model, some_trees, loss, tokens=tokens, passes=passes)
        assert metrics == pytest.approx(expected[0], rel=2e-5, abs=1e-5)
        assert_close_gradients(gradients, expected[1], rtol=5e-5)


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_a_loss_without_reference_wants_none(
    name: str, network: Any, some_trees: list[Tree], step: Any, bound: Any, assert_close_gradients: Any
) -> None:
    bare = [replace(tree, branches=tuple(replace(b, reference_L=None) for b in tree.branches)) for tree in some_trees]
    loss = bound(name)
    assert not VIEWS[loss.loss.inputs].reference
    expected = step(network(), some_trees, loss)
    metrics, gradients = step(network(), bare, loss)
    assert metrics == expected[0]
    assert_close_gradients(gradients, expected[1], rtol=1e-6)
    assert VIEWS[bound("dpo").loss.inputs].reference
    with pytest.raises(ValueError, match="needs reference log-probabilities"):
        step(network(), bare, bound("dpo"))


def test_length_desensitising_counts_from_the_shorter_of_each_pair(
    network: Any, pair_tree: Any, step: Any, bound: Any
) -> None:
    """A ranking of completions with 3, 9 and 5 tokens, some without loss: each of its pairs has its own common length.

    By numpy, token by token: the first tokens that carry loss, as many as the shorter one has, count 1, the rest ¼.
    """
    tree = pair_tree(np.random.default_rng(6), 6, (3, 9, 5))
    model = network()
    (answers,) = Engine(model, EngineConfig(precision="float32")).forward([tree])
    ratios = [
        (values - branch.reference_L)[branch.loss_mask_L] for values, branch in zip(answers, tree.branches, strict=True)
    ]
    assert len({len(values) for values in ratios}) == 3

    def weighed(mine: Any, other: Any) -> float:
        counts = np.where(np.arange(len(mine)) < len(other), 1.0, 0.25)
        return float((counts * mine).sum())

    expected = {
        "rewards/chosen": np.mean([0.2 * weighed(ratios[i], ratios[j]) for i, j in tree.pairs]),
        "rewards/rejected": np.mean([0.2 * weighed(ratios[j], ratios[i]) for i, j in tree.pairs]),
    }
    for tokens in (4096, 1):
        metrics, _ = step(model, [tree], bound("dpo", beta=0.2, ld_alpha=0.25), tokens=tokens)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_lengths_count_tokens_that_carry_loss(network: Any, pair_tree: Any, step: Any, bound: Any) -> None:
    """SimPO's rewards are β times the mean over those; without a prompt the first token has no log-probability."""
    tree = pair_tree(np.random.default_rng(8), 0, (6, 4))
    model = network()
    (answers,) = Engine(model, EngineConfig(precision="float32")).forward([tree])
    counts = [int(branch.loss_mask_L[1:].sum()) for branch in tree.branches]
    metrics, _ = step(model, [tree], bound("simpo", beta=2.0))
    assert metrics["rewards/chosen"] == pytest.approx(2 * answers[0].sum() / counts[0], rel=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(2 * answers[1].sum() / counts[1], rel=1e-5)
