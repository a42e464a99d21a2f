"""Prompt trees, packing, branch attention and chunked log-probabilities together: equal to plain padded rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import ModelError
from accord.models import attention, logprobs
from accord.models.packing import pack
from accord.models.trees import Branch, Tree

BRANCHING = ("llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "phi", "phi3", "mistral", "deepseek_v3")


@pytest.fixture(scope="session")
def mixed_trees(random_tree: Any) -> list[Tree]:
    """K = 0 … 4, an empty prompt, one-token completions, sequences beyond the tiny sliding windows of 16."""
    rng = np.random.default_rng(7)
    shapes = [(21, (19, 5)), (6, (9,)), (0, (7, 4, 3)), (3, ()), (13, (1, 30, 2, 8))]
    return [random_tree(rng, prompt, lengths) for prompt, lengths in shapes]


@pytest.mark.parametrize("architecture", BRANCHING)
def test_logprobs_and_all_gradients_equal_the_plain_model(
    architecture: str, tiny: Any, mixed_trees: list[Tree], packed_answer: Any, plain_answer: Any, assert_same: Any
) -> None:
    policy, plain = tiny(architecture)
    assert policy.branching
    assert_same(packed_answer(policy, mixed_trees), plain_answer(plain, mixed_trees))


def test_the_gemma2_that_is_tested_has_soft_caps_and_a_window_that_hides_tokens(tiny: Any) -> None:
    """Else the comparison above would not show that they are honoured."""
    config = tiny("gemma2")[0].model.config
    assert config.attn_logit_softcapping
    assert config.final_logit_softcapping
    assert config.sliding_window == 16
    assert "sliding_attention" in config.layer_types
    assert tiny("mistral")[0].model.config.sliding_window == 16


@pytest.mark.parametrize("architecture", ["mamba", "bloom"])
def test_a_model_that_cannot_branch_falls_back_to_one_row_per_completion(
    architecture: str, tiny: Any, mixed_trees: list[Tree], packed_answer: Any, plain_answer: Any, assert_same: Any
) -> None:
    """A state space has no attention; Bloom has its own, which does not know transformers' attention interface."""
    policy, plain = tiny(architecture)
    assert not policy.branching
    assert_same(packed_answer(policy, mixed_trees), plain_answer(plain, mixed_trees))


@st.composite
def shapes(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """Lengths of prompts and branches of 1 … 4 trees, of which at least one has a branch."""
    lengths = st.lists(st.integers(1, 12), max_size=4)
    trees = draw(st.lists(st.tuples(st.integers(0, 12), lengths), min_size=1, max_size=4))
    return [*trees, (draw(st.integers(1, 12)), [draw(st.integers(1, 12))])]


@settings(max_examples=60)
@given(st.sampled_from(BRANCHING), shapes(), st.integers(0, 1 << 30))
def test_any_tree_equals_the_plain_model(
    tiny: Any,
    random_tree: Any,
    packed_answer: Any,
    plain_answer: Any,
    assert_same: Any,
    architecture: str,
    shapes: list[tuple[int, list[int]]],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, prompt, lengths) for prompt, lengths in shapes]
    policy, plain = tiny(architecture)
    assert_same(packed_answer(policy, trees), plain_answer(plain, trees))


@settings(max_examples=40)
@given(shapes(), st.integers(0, 1 << 30), st.integers(1, 80), st.randoms(use_true_random=False))
def test_order_budget_and_number_of_micro_batches_change_nothing(
    tiny: Any,
    random_tree: Any,
    packed_answer: Any,
    assert_same: Any,
    shapes: list[tuple[int, list[int]]],
    seed: int,
    budget: int,
    random: Any,
) -> None:
    """The trees in another order and under another budget: the same log-probabilities, the same gradient."""
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, prompt, lengths) for prompt, lengths in shapes]
    policy, _ = tiny("llama")
    order = list(range(len(trees)))
    random.shuffle(order)
    said, gradients = packed_answer(policy, [trees[index] for index in order], budget=budget)
    pieces = iter(said)
    by_tree = {index: [next(pieces) for _ in trees[index].branches] for index in order}
    in_order = [values for index in sorted(by_tree) for values in by_tree[index]]
    assert_same((in_order, gradients), packed_answer(policy, trees, budget=4096), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize(("block", "keep"), [(8, 1 << 30), (8, 0), (7, 60)])
def test_attention_in_blocks_kept_or_computed_again(
    architecture: str,
    block: int,
    keep: int,
    tiny: Any,
    mixed_trees: list[Tree],
    packed_answer: Any,
    plain_answer: Any,
    assert_same: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Segments of up to 30 tokens cross blocks of 7 or 8 rows; weights are kept, computed again, or some of each."""
    monkeypatch.setattr(attention, "_BLOCK", block)
    monkeypatch.setattr(attention, "_KEEP", keep)
    policy, plain = tiny(architecture)
    assert_same(packed_answer(policy, mixed_trees), plain_answer(plain, mixed_trees))


def test_segments_longer_than_a_real_block(
    tiny: Any, random_tree: Any, packed_answer: Any, plain_answer: Any, assert_same: Any
) -> None:
    """A prompt of 270 and a completion of 300: both cross the real 256-row block; the last blocks see 570 columns."""
    policy, plain = tiny("llama", max_position_embeddings=1024)
    trees = [random_tree(np.random.default_rng(3), 270, (300, 4))]
    assert attention._BLOCK < 300
    assert_same(packed_answer(policy, trees), plain_answer(plain, trees))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "phi"])
@pytest.mark.parametrize("keep", [1 << 30, 0])
def test_log_probs_in_chunks_kept_or_computed_again(
    architecture: str,
    keep: int,
    tiny: Any,
    mixed_trees: list[Tree],
    packed_answer: Any,
    plain_answer: Any,
    assert_same: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks of five rows of a vocabulary of 259."""
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 5 * 259 * 4)
    monkeypatch.setattr(logprobs, "_KEEP_BYTES", keep)
    policy, plain = tiny(architecture)
    assert_same(packed_answer(policy, mixed_trees), plain_answer(plain, mixed_trees))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_bfloat16_is_close_to_float32(
    architecture: str, tiny: Any, mixed_trees: list[Tree], packed_answer: Any
) -> None:
    """bfloat16 has 8 significant bits: a product is off by up to 2⁻⁸ = 0.4 % of its size.

    The logits of these models are a few units wide and three layers add their errors: log-probabilities within 0.25
    nats at worst and 0.05 on average, the gradient's direction within a cosine of 0.99.
    """
    policy, _ = tiny(architecture)
    exact, gradients = packed_answer(policy, mixed_trees)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_gradients = packed_answer(policy, mixed_trees)
    difference = (torch.cat(rough) - torch.cat(exact)).abs()
    assert 0 < float(difference.max()) < 0.25
    assert float(difference.mean()) < 0.05
    one = torch.cat([g.flatten() for g in gradients.values()])
    other = torch.cat([g.flatten() for g in rough_gradients.values()])
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.99


def test_a_prompt_is_computed_once(random_tree: Any) -> None:
    """A tree of 10 + 3·4 = 22 tokens stands in 22 rows (rounded up to 32), not in 3·14 = 42."""
    batch = pack([random_tree(np.random.default_rng(0), 10, (4, 4, 4))], 4096)[0]
    assert len(batch.input_ids_T) == 32
    assert [span.start for span in batch.layout[0].branches] == [10, 14, 18]
    assert batch.positions_T[:22].tolist() == [*range(10), *([10, 11, 12, 13] * 3)]


def test_packing_keeps_the_budget_and_loses_no_branch(random_tree: Any) -> None:
    """Only a prompt with one single branch may be larger than the budget."""
    rng = np.random.default_rng(5)
    shapes = [(10, 5, 3), (40, 8, 4), (2, 90, 2), (7, 3, 0), (5, 5, 1)]
    trees = [random_tree(rng, prompt, (length,) * k) for prompt, length, k in shapes]
    for budget in (1, 30, 64, 1000):
        batches = pack(trees, budget)
        seen = sorted((part.tree, k) for batch in batches for part in batch.parts for k in part.branches)
        assert seen == [(t, k) for t, tree in enumerate(trees) for k in range(len(tree.branches))]
        for batch in batches:
            size = sum(
                layout.prompt.length + sum(s.length for s in layout.branches)
                for layout in batch.layout[: len(batch.parts)]
            )
            assert size <= budget or len(batch.last_C) == 1


def test_attention_with_sinks_or_dropout_is_refused() -> None:
    module, states = torch.nn.Identity(), torch.zeros(1, 2, 3, 4)
    batch = pack([Tree(np.array([3]), (Branch(np.array([4, 5]), np.ones(2, bool)),))], 64)[0]
    with pytest.raises(ModelError, match="sinks"):
        attention.branch_attention(module, states, states, states, None, batch=batch, s_aux=torch.zeros(2))
    with pytest.raises(ModelError, match="dropout"):
        attention.branch_attention(module, states, states, states, None, batch=batch, dropout=0.1)


def test_products_of_attention_have_few_shapes(random_tree: Any) -> None:
    """Whatever the lengths: rows and columns are multiples of 32, so 8 · 32 shapes at most up to 1,024 tokens."""
    rng = np.random.default_rng(1)
    trees = [random_tree(rng, int(rng.integers(0, 300)), tuple(rng.integers(1, 300, 2))) for _ in range(100)]
    blocks = [block for batch in pack(trees, 1024) for block in attention._blocks(batch)]
    assert all(size % 32 == 0 for block in blocks for size in block.shape)
    assert all(0 <= block.shape[0] - block.rows.length < 32 for block in blocks)
