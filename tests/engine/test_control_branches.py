"""Control branches: which completion is whose, one constant per step, and no trace of them in the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.engine.engine import Engine, EngineConfig
from accord.engine.reference import attach_reference
from accord.errors import DataError
from accord.models.controls import control_tree, with_controls
from accord.models.trees import Branch, Tree, share_prompts
from accord.types import Source

LOSSES = [
    ("kto", {"beta": 0.3, "desirable_weight": 1.5}),
    ("apo_zero_unpaired", {}),
    ("bco", {"undesirable_weight": 2}),
]


def sized(sizes: Sequence[int], tokens: int = 3) -> list[Tree]:
    """Trees with so many branches; the first token of a branch that carries loss names its tree and its place."""
    return [
        Tree(
            np.array([t]),
            tuple(
                Branch(np.array([1, 1000 * t + k] + [2] * (tokens - 2)), np.array([False] + [True] * (tokens - 1)))
                for k in range(size)
            ),
            labels=(True,) * size,
        )
        for t, size in enumerate(sizes)
    ]


def name(branch: Branch) -> int:
    return int(branch.tokens_L[0])


@given(st.lists(st.integers(1, 5), min_size=2, max_size=8), st.integers(0, 99))
def test_controls_are_completions_of_other_prompts(sizes: list[int], seed: int) -> None:
    """One for each branch, each used once unless one prompt holds more than half; drawn by the seed alone."""
    trees = with_controls(sized(sizes), seed, max_tokens=99)
    used: Counter[int] = Counter()
    for t, tree in enumerate(trees):
        assert len(tree.controls) == len(tree.branches) == sizes[t]
        assert all(name(control) // 1000 != t for control in tree.controls)
        used.update(name(control) for control in tree.controls)
    if 2 * max(sizes) <= sum(sizes):
        assert used == {1000 * t + k: 1 for t, size in enumerate(sizes) for k in range(size)}
    again = with_controls(sized(sizes), seed, max_tokens=99)
    assert [list(map(name, t.controls)) for t in again] == [list(map(name, t.controls)) for t in trees]


def test_another_seed_draws_other_controls() -> None:
    drawn = {tuple(name(t.controls[0]) for t in with_controls(sized([1] * 20), seed, 99)) for seed in range(5)}
    assert len(drawn) == 5


def test_a_control_begins_where_its_completion_does_and_fits_the_limit() -> None:
    """10 tokens, the first without loss: 9 from there on, cut to what a limit of 6 leaves behind a prompt of 1."""
    (control,) = with_controls(sized([1, 1], tokens=10), seed=0, max_tokens=99)[0].controls
    assert control.tokens_L.tolist() == [1000] + [2] * 8
    assert control.loss_mask_L.all()
    (cut,) = with_controls(sized([1, 1], tokens=10), seed=0, max_tokens=6)[0].controls
    assert cut.tokens_L.tolist() == [1000, 2, 2, 2, 2]


def test_one_prompt_alone_has_no_controls() -> None:
    with pytest.raises(DataError, match="same prompt"):
        with_controls(sized([3]), seed=0, max_tokens=99)


def test_labelled_trees_of_one_prompt_become_one(labelled: list[Tree]) -> None:
    first, second, third = (replace(tree, source=Source("a.jsonl", line)) for line, tree in enumerate(labelled[:3]))
    shared = share_prompts([first, second, replace(third, prompt_P=first.prompt_P)])
    assert [tree.source for tree in shared] == [first.source, second.source]
    assert shared[0].branches == (*first.branches, *third.branches)
    assert shared[0].labels == (*first.labels, *third.labels)
    assert shared[0].pairs == ()


@pytest.fixture(scope="module")
def labelled(pair_tree: Any) -> list[Tree]:
    """Six trees of 1 to 3 labelled completions, each with a control of its own, references random."""
    rng = np.random.default_rng(5)
    shapes = [(9, (5,)), (3, (12, 2)), (20, (4,)), (1, (6, 9, 2)), (14, (3,)), (6, (8,))]
    labels = [(True,), (True, False), (False,), (False, True, True), (True,), (False,)]
    return [
        replace(
            pair_tree(rng, prompt, lengths),
            ranks=(0,) * len(lengths),
            labels=labels[t],
            controls=pair_tree(rng, 1, [n + 3 for n in lengths]).branches,
        )
        for t, (prompt, lengths) in enumerate(shapes)
    ]


@settings(max_examples=12)
@given(order=st.permutations(range(6)), tokens=st.integers(1, 80), loss=st.sampled_from(LOSSES))
def test_order_and_budget_change_no_gradient(
    order: list[int],
    tokens: int,
    loss: Any,
    network: Any,
    labelled: list[Tree],
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
) -> None:
    """A budget of 1 gives every branch a micro-batch of its own, and every control."""
    model = network()
    bind = bound(loss[0], **loss[1])
    metrics, gradients = step(model, labelled, bind)
    other, permuted = step(model, [labelled[i] for i in order], bind, tokens=tokens)
    assert other == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert_close_gradients(permuted, gradients, rtol=3e-5)


@pytest.mark.parametrize(("loss", "options"), LOSSES)
def test_one_pass_and_two_passes_give_the_same_gradient(
    loss: str, options: Any, network: Any, labelled: list[Tree], step: Any, bound: Any, assert_close_gradients: Any
) -> None:
    one, expected = step(network(), labelled, bound(loss, **options), passes="one")
    two, gradients = step(network(), labelled, bound(loss, **options), passes="two")
    assert two == pytest.approx(one, rel=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_the_kl_is_one_constant_of_the_step(
    architecture: str, network: Any, labelled: list[Tree], step: Any, bound: Any, assert_close_gradients: Any
) -> None:
    """The oracle: the mean log-ratio of the controls by `forward`, added to the reference of every branch.

    KTO with a KL of z is APO-zero against a reference that is more likely by z; if any gradient flowed through the
    controls, the two would differ.
    """
    model, z = network(architecture), 0.0
    controls = [control_tree(tree) for tree in labelled]
    answers = Engine(model, EngineConfig(precision="float32")).forward(controls)
    ratios = [
        float(values.sum() - branch.reference_L.sum())
        for tree, answer in zip(controls, answers, strict=True)
        for branch, values in zip(tree.branches, answer, strict=True)
        if branch.reference_L is not None
    ]
    assert len(ratios) == 9
    lift = 100.0  # random references are so unlikely that the mean is far below zero: make it a KL
    raised = [replace(tree, controls=tuple(shifted(branch, -lift) for branch in tree.controls)) for tree in labelled]
    z = float(np.mean(ratios)) + lift
    assert z > 0
    metrics, gradients = step(model, raised, bound("kto", beta=0.02), tokens=30)
    expected, constant = step(
        model,
        [replace(tree, branches=tuple(shifted(branch, z) for branch in tree.branches)) for tree in labelled],
        bound("apo_zero_unpaired", beta=0.02),
    )
    assert metrics["kl"] == pytest.approx(z, rel=1e-5)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_close_gradients(gradients, constant)


def shifted(branch: Branch, by: float) -> Branch:
    """The same branch with a reference log-probability that is larger by `by`."""
    assert branch.reference_L is not None
    reference = branch.reference_L.copy()
    reference[-1] += by
    return replace(branch, reference_L=reference)


def test_controls_never_meet_the_backward_pass(network: Any, labelled: list[Tree], bound: Any) -> None:
    """Tokens that pass through the network with gradients: those of the trees; without: those of the control trees."""
    seen: Counter[bool] = Counter()
    model = network()
    model.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.update({torch.is_grad_enabled(): inputs[0].numel()})
    )
    Engine(model, EngineConfig(precision="float32")).forward_backward(labelled, bound("kto"))
    unique = [sum(map(len, trees)) for trees in (labelled, [control_tree(tree) for tree in labelled])]
    assert [seen[True], seen[False]] == [-(-count // 32) * 32 for count in unique]  # rows are filled up to 32
    seen.clear()
    Engine(model, EngineConfig(precision="float32")).forward_backward(labelled, bound("apo_zero_unpaired"))
    assert seen[False] == 0


@pytest.mark.parametrize("tokens", [4096, 1])
def test_metrics_are_means_over_each_label(
    tokens: int, network: Any, labelled: list[Tree], step: Any, bound: Any
) -> None:
    """Every completion counts once, whatever its tree: 5 good and 4 bad ones against `forward`."""
    model = network()
    answers = Engine(model, EngineConfig(precision="float32")).forward(labelled)
    sums: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for tree, answer in zip(labelled, answers, strict=True):
        for branch, label, values in zip(tree.branches, tree.labels, answer, strict=True):
            assert branch.reference_L is not None
            sums[label].append((float(values.sum()), 0.1 * float(values.sum() - branch.reference_L.sum())))
    assert {label: len(rows) for label, rows in sums.items()} == {True: 5, False: 4}
    metrics, _ = step(model, labelled, bound("kto"), tokens=tokens)
    for side, label in (("chosen", True), ("rejected", False)):
        logps, rewards = np.mean(sums[label], axis=0)
        assert metrics[f"logps/{side}"] == pytest.approx(logps, rel=1e-5)
        assert metrics[f"rewards/{side}"] == pytest.approx(rewards, rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


def test_a_step_with_one_label_says_nothing_of_the_other(
    network: Any, labelled: list[Tree], step: Any, bound: Any
) -> None:
    good = [tree for tree in labelled if all(tree.labels)]
    metrics, gradients = step(network(), good, bound("kto"))
    assert {key for key in metrics if "/" in key} == {"rewards/chosen", "logps/chosen"}
    assert all(np.isfinite(value) for value in metrics.values())
    assert any(bool(gradient.any()) for gradient in gradients.values())


def test_a_prompt_with_two_labels_is_two_examples(
    network: Any, labelled: list[Tree], step: Any, bound: Any, assert_close_gradients: Any
) -> None:
    """Trees cut into one completion each give the same loss and gradient."""
    alone = [
        replace(tree, branches=(branch,), ranks=(0,), labels=(label,), controls=(control,))
        for tree in labelled
        for branch, label, control in zip(tree.branches, tree.labels, tree.controls, strict=True)
    ]
    assert len(alone) == 9
    model = network()
    for loss, options in LOSSES:
        expected = step(model, alone, bound(loss, **options))
        metrics, gradients = step(model, labelled, bound(loss, **options))
        assert metrics == pytest.approx(expected[0], rel=1e-5)
        assert_close_gradients(gradients, expected[1], rtol=2e-5)


def test_references_of_controls_are_cached_apart(network: Any, labelled: list[Tree], tmp_path: Path) -> None:
    """Other controls do not make the branches' references be computed again."""
    engine = Engine(network(), EngineConfig(precision="float32"))
    bare = [replace(tree, controls=()) for tree in labelled]
    work: list[tuple[int, int]] = []

    def attach(seed: int) -> list[Tree]:
        work.clear()
        trees = with_controls(bare, seed, 99)
        return attach_reference(engine, trees, tmp_path / "cache", lambda *done: work.append(done))

    first = attach(0)
    assert sum(count for count, _ in work) == 12
    assert sum(tokens for _, tokens in work) == sum(len(t) + len(control_tree(t)) for t in first)
    for tree in first:
        (answer,) = engine.forward([control_tree(tree)])
        for control, values in zip(tree.controls, answer, strict=True):
            np.testing.assert_allclose(control.reference_L, values, atol=1e-5)
    second = attach(1)
    assert sum(tokens for _, tokens in work) <= sum(len(control_tree(tree)) for tree in second)


def test_kto_without_controls_is_refused(network: Any, labelled: list[Tree], step: Any, bound: Any) -> None:
    with pytest.raises(ValueError, match="control"):
        step(network(), [replace(tree, controls=()) for tree in labelled], bound("kto"))
