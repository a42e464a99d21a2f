"""The engine: two ways to one gradient, global denominators, schedules, clipping, and what it refuses."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig, learning_rate_at
from accord.engine.precision import resolve_precision
from accord.errors import AccordError
from accord.models.trees import Branch, Tree
from accord.types import Source

LOSSES = [("sft", {}), ("dpo", {"beta": 0.2, "label_smoothing": 0.1}), ("bradley_terry", {"centre": 0.05})]


@pytest.mark.parametrize(("name", "options"), LOSSES)
@pytest.mark.parametrize("tokens", [4096, 40])
def test_one_pass_and_two_passes_give_the_same_gradient(
    name: str,
    options: Any,
    tokens: int,
    network: Any,
    some_trees: list[Tree],
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
) -> None:
    """A budget of 40 makes several micro-batches; no tree is larger, so one pass is possible."""
    model = network(reward=name == "bradley_terry")
    one, expected = step(model, some_trees, bound(name, **options), tokens=tokens, passes="one")
    two, gradients = step(model, some_trees, bound(name, **options), tokens=tokens, passes="two")
    assert two == pytest.approx(one, rel=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), LOSSES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_micro_batches_and_cut_trees_change_nothing(
    name: str,
    options: Any,
    architecture: str,
    network: Any,
    some_trees: list[Tree],
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
) -> None:
    """A budget of 15 cuts a pair into two parts (its prompt is then computed twice); 1 gives every branch its own."""
    model = network(architecture, reward=name == "bradley_terry")
    expected = step(model, some_trees, bound(name, **options))
    for tokens in (50, 15, 1):
        metrics, gradients = step(model, some_trees, bound(name, **options), tokens=tokens)
        assert metrics == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
        assert_close_gradients(gradients, expected[1], rtol=2e-5)


@settings(max_examples=15)
@given(st.permutations(range(5)), st.integers(1, 100), st.sampled_from(LOSSES))
def test_order_and_budget_change_no_gradient(
    network: Any,
    some_trees: list[Tree],
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
    order: list[int],
    tokens: int,
    loss: Any,
) -> None:
    name, options = loss
    model = network(reward=name == "bradley_terry")
    expected = step(model, some_trees, bound(name, **options))
    metrics, gradients = step(model, [some_trees[i] for i in order], bound(name, **options), tokens=tokens)
    assert metrics == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert_close_gradients(gradients, expected[1], rtol=2e-5)


def test_sft_averages_over_tokens_and_pairs_over_prompts(
    network: Any, some_trees: list[Tree], step: Any, bound: Any, assert_close_gradients: Any
) -> None:
    """The oracle: each tree alone, averaged with its number of tokens (SFT) or equally (DPO)."""
    for name in ("sft", "dpo"):
        model = network()
        tokens = [sum(int(b.loss_mask_L.sum()) for b in tree.branches) for tree in some_trees]
        weights = [count / sum(tokens) for count in tokens] if name == "sft" else [1 / 5] * 5
        alone = [step(model, [tree], bound(name)) for tree in some_trees]
        metrics, gradients = step(model, some_trees, bound(name))
        mean = sum(weight * each["loss"] for weight, (each, _) in zip(weights, alone, strict=True))
        assert metrics["loss"] == pytest.approx(mean, rel=1e-5)
        expected = {n: sum(w * each[n] for w, (_, each) in zip(weights, alone, strict=True)) for n in gradients}
        assert_close_gradients(gradients, expected, rtol=2e-5)


def scores_of(model: Any, trees: list[Tree]) -> list[list[float]]:
    answers = Engine(model, EngineConfig(precision="float32")).forward(trees)
    return [[float(branch[0]) for branch in answer] for answer in answers]


def test_a_ranking_weighs_as_much_as_a_pair(network: Any, pair_tree: Any, step: Any, bound: Any) -> None:
    """K = 4 without ties gives 6 pairs of weight 1/6; K = 3 with ranks 0, 1, 1 gives 2 pairs of weight 1/2."""
    rng = np.random.default_rng(2)
    four, tied, pair = pair_tree(rng, 6, (3, 5, 2, 4)), pair_tree(rng, 4, (2, 3, 4), ranks=(1, 0, 1)), None
    pair = pair_tree(rng, 5, (4, 4), margin=0.5)
    model = network(reward=True)
    metrics, _ = step(model, [four, tied, pair], bound("bradley_terry"))
    a, b, c = scores_of(model, [four, tied, pair])

    def cost(better: float, worse: float, margin: float = 0.0) -> float:
        return math.log1p(math.exp(-(better - worse - margin)))

    costs = [
        float(np.mean([cost(a[i], a[j]) for i, j in itertools.combinations(range(4), 2)])),
        (cost(b[1], b[0]) + cost(b[1], b[2])) / 2,
        cost(c[0], c[1], 0.5),
    ]
    assert metrics["loss"] == pytest.approx(np.mean(costs), rel=1e-5)


def test_a_prompt_of_ties_only_has_no_weight(
    network: Any, some_trees: list[Tree], step: Any, bound: Any, assert_close_gradients: Any
) -> None:
    model = network()
    tie = replace(some_trees[0], ranks=(0, 0))
    expected = step(model, some_trees[1:], bound("dpo"))
    metrics, gradients = step(model, [tie, *some_trees[1:]], bound("dpo"))
    assert metrics == pytest.approx(expected[0], rel=1e-5)
    assert_close_gradients(gradients, expected[1], rtol=1e-5)
    with pytest.raises(AccordError, match=r"x\.jsonl:4.*nothing to learn"):
        step(model, [replace(tie, source=Source("x.jsonl", 4))], bound("dpo"))


def test_forward_gives_zero_where_no_loss_is_carried(network: Any) -> None:
    """An empty prompt predicts no first token, so that one has no log-probability either."""
    tokens, mask = np.array([5, 6, 7]), np.array([True, False, True])
    trees = [Tree(prompt, (Branch(tokens, mask),)) for prompt in (np.array([], dtype=np.int64), np.array([9]))]
    without, behind = (answer[0] for answer in Engine(network(), EngineConfig(precision="float32")).forward(trees))
    assert [value == 0 for value in without] == [True, True, False]
    assert [value == 0 for value in behind] == [False, True, False]
    assert (without <= 0).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, warm-up of ⌈0.2 · 10⌉ = 2: half the rate, the rate, and then down with 0/8, 1/8 … 7/8 done.
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup=0.2)
    rates = [learning_rate_at(step, 10, config) for step in range(10)]
    assert rates == pytest.approx([2 * factor for factor in expected], abs=1e-6)


def test_a_schedule_of_one_step_has_its_full_rate() -> None:
    for warmup in (0.0, 0.5):
        assert learning_rate_at(0, 1, OptimizerConfig(learning_rate=3.0, warmup=warmup)) == 3.0


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_clipping_bounds_the_norm_of_the_whole_gradient(
    clip: float, network: Any, some_trees: list[Tree], bound: Any
) -> None:
    """After one step Adam's first moment is (1 − β₁) · clipped gradient, which shows what the optimiser saw."""
    model = network()
    engine = Engine(model, EngineConfig(precision="float32"), OptimizerConfig(gradient_clip=clip, beta1=0.5))
    engine.forward_backward(some_trees, bound("sft"))
    raw = float(torch.stack([p.grad.norm() for p in model.trainable()]).norm())
    assert engine.optim_step(1e-3) == pytest.approx(raw, rel=1e-5)
    assert engine.optimizer is not None
    moments = [engine.optimizer.state[p]["exp_avg"].norm() for p in model.trainable()]
    assert float(torch.stack(moments).norm()) / 0.5 == pytest.approx(min(raw, clip), rel=1e-3)
    assert all(p.grad is None or not p.grad.any() for p in model.trainable())


def test_the_first_step_is_adamws(network: Any, some_trees: list[Tree], bound: Any) -> None:
    """By hand for the first step: p ← p(1 − ηλ) − η · g / (|g| + ε), because both bias corrections cancel."""
    model = network()
    engine = Engine(model, EngineConfig(precision="float32"), OptimizerConfig(weight_decay=0.1, gradient_clip=1e6))
    engine.forward_backward(some_trees, bound("sft"))
    before = [(p.detach().clone(), p.grad.clone()) for p in model.trainable()]
    engine.optim_step(0.01)
    for parameter, (old, gradient) in zip(model.trainable(), before, strict=True):
        expected = old * (1 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_a_loss_that_is_not_finite_names_the_rows(
    passes: Any, network: Any, some_trees: list[Tree], step: Any, bound: Any
) -> None:
    model = network()
    with torch.no_grad():
        model.model.get_input_embeddings().weight.fill_(float("nan"))
    trees = [replace(tree, source=Source("pairs.jsonl", 3 + index)) for index, tree in enumerate(some_trees)]
    with pytest.raises(AccordError, match=r"pairs\.jsonl:3, .*pairs\.jsonl:7: The loss is nan"):
        step(model, trees, bound("dpo"), passes=passes)


def test_a_gradient_that_is_not_finite_changes_no_weight(network: Any, some_trees: list[Tree], bound: Any) -> None:
    model = network()
    engine = Engine(model, EngineConfig(precision="float32"), OptimizerConfig())
    engine.forward_backward(some_trees, bound("sft"))
    model.trainable()[0].grad[0] = float("inf")
    before = [p.detach().clone() for p in model.trainable()]
    with pytest.raises(AccordError, match="norm is"):
        engine.optim_step(1e-3)
    assert all(torch.equal(p, old) for p, old in zip(model.trainable(), before, strict=True))


@pytest.mark.parametrize(
    ("architecture", "inner"), [("llama", "q_proj"), ("gpt2", "c_attn"), ("gemma2", "q_proj"), ("mamba", "in_proj")]
)
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_activation_checkpointing_changes_no_gradient(
    architecture: str, inner: str, name: str, network: Any, some_trees: list[Tree], bound: Any
) -> None:
    """The same bits, and a layer inside a block is computed twice: once forward, once more in the backward pass."""
    gradients, calls = {}, {}
    for mode in ("off", "on"):
        model = network(architecture)
        config = EngineConfig(precision="float32", activation_checkpointing=mode)
        engine = Engine(model, config, OptimizerConfig())
        seen: list[None] = []
        layer = next(m for n, m in model.model.named_modules() if n.endswith(inner))
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(None))
        engine.forward_backward(some_trees, bound(name), passes="one" if model.branching else "auto")
        calls[mode] = len(seen)
        gradients[mode] = {n: p.grad for n, p in model.model.named_parameters()}
    cut_pair = not model.branching and name == "dpo"
    forwards = 3 if cut_pair else 2  # a cut pair takes a pass without gradients first
    assert calls["on"] == forwards * calls["off"] // (forwards - 1)
    assert all(torch.equal(gradient, gradients["off"][n]) for n, gradient in gradients["on"].items())


def test_bfloat16_is_close_to_float32(network: Any, some_trees: list[Tree], step: Any, bound: Any) -> None:
    """8 significant bits: the loss within 2 %, the gradient's direction within a cosine of 0.98."""
    for name in ("sft", "bradley_terry"):
        model = network(reward=name == "bradley_terry")
        metrics, expected = step(model, some_trees, bound(name))
        model.model.zero_grad()
        rough = Engine(model, EngineConfig(precision="bfloat16")).forward_backward(some_trees, bound(name))
        assert rough["loss"] != metrics["loss"]
        assert rough["loss"] == pytest.approx(metrics["loss"], rel=0.02)
        gradients = {n: p.grad for n, p in model.model.named_parameters() if p.grad is not None}
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        one, other = (torch.cat([g[n].flatten() for n in sorted(expected)]) for g in (gradients, expected))
        assert float(torch.cosine_similarity(one, other, dim=0)) > 0.98


def test_precision_by_name() -> None:
    device = torch.device("cpu")
    assert resolve_precision("float32", device) is torch.float32
    assert resolve_precision("bfloat16", device) is torch.bfloat16
    assert resolve_precision("auto", device) in (torch.float32, torch.bfloat16)
