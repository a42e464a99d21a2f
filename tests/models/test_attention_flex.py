"""FlexAttention's block mask against the definition, cell by cell, and its numbers against the products'.

On a CPU it runs forward only; tests/gpu holds what needs a backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from accord.models import attention, attention_flex
from accord.models.packing import MicroBatch, pack
from accord.models.trees import Branch, Tree


def tree(rng: np.random.Generator, prompt: int, lengths: tuple[int, ...]) -> Tree:
    branches = tuple(Branch(rng.integers(3, 259, length), np.ones(length, bool)) for length in lengths)
    return Tree(rng.integers(3, 259, prompt), branches, ranks=tuple(range(len(lengths))))


@pytest.fixture(scope="module")
def batch() -> MicroBatch:
    """Trees of two, one and four branches, an empty prompt, a prompt alone, and idle rows: 224 in all, two blocks."""
    rng = np.random.default_rng(2)
    shapes = [(21, (19, 5)), (6, (9,)), (0, (7, 4)), (3, ()), (40, (1, 30, 2, 60))]
    return pack([tree(rng, prompt, lengths) for prompt, lengths in shapes], 4096)[0]


def visible(batch: MicroBatch, row: int, column: int, window: int | None) -> bool:
    """The rule in words: the same tree; the column in its prompt or in the row's own branch; not after it; near it."""
    for layout in batch.layout:
        spans = (layout.prompt, *layout.branches)
        place = {r: k for k, span in enumerate(spans) for r in range(span.start, span.start + span.length)}
        if row in place and column in place:
            position = batch.positions_T.tolist()
            near = window is None or position[row] - position[column] < window
            return place[column] in (0, place[row]) and position[column] <= position[row] and near
    return False


@pytest.mark.parametrize("window", [None, 16])
def test_the_mask_is_the_rule(batch: MicroBatch, window: int | None) -> None:
    length = len(batch.input_ids_T)
    mask = attention_flex.block_mask(batch, window, torch.device("cpu"))
    found = create_mask(mask.mask_mod, 1, 1, length, length, device="cpu")[0, 0]
    expected = [[visible(batch, row, column, window) for column in range(length)] for row in range(length)]
    assert torch.equal(found, torch.tensor(expected))


def test_idle_rows_are_seen_by_no_tree(batch: MicroBatch) -> None:
    idle = batch.layout[-1]
    assert not idle.branches
    assert idle.prompt.length > 0
    mask = attention_flex.block_mask(batch, None, torch.device("cpu"))
    length = len(batch.input_ids_T)
    found = create_mask(mask.mask_mod, 1, 1, length, length, device="cpu")[0, 0]
    assert not found[: idle.prompt.start, idle.prompt.start :].any()


def test_blocks_of_which_nothing_is_visible_are_skipped() -> None:
    """Three trees of 128 rows each: of the nine blocks only the diagonal is computed."""
    rng = np.random.default_rng(0)
    packed = pack([tree(rng, 64, (64,)) for _ in range(3)], 4096)[0]
    mask = attention_flex.block_mask(packed, None, torch.device("cpu"))
    assert torch.equal(mask.to_dense()[0, 0], torch.eye(3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("window", "softcap", "groups"), [(None, None, 1), (16, None, 2), (None, 5.0, 3), (16, 5.0, 1)]
)
def test_the_same_numbers_as_the_products(
    batch: MicroBatch, window: int | None, softcap: float | None, groups: int
) -> None:
    generator = torch.Generator().manual_seed(4)
    length = len(batch.input_ids_T)
    query = torch.randn(2 * groups, length, 16, generator=generator)
    key, value = (torch.randn(2, length, 16, generator=generator) for _ in range(2))
    settings: Any = (batch, 0.3, window, softcap)
    batch.masks.clear()
    products = attention._attend(query, key, value, *settings)
    batch.masks.clear()
    flex = attention_flex.attend(query, key, value, *settings)
    batch.masks.clear()
    real = batch.layout[-1].prompt.start  # what stands behind only rounds up: nothing reads it
    torch.testing.assert_close(flex[:real], products[:real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_whole_model_says_the_same(
    architecture: str, tiny: Any, batch: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 has layers with and without a window, soft caps, and two query heads for each key head."""
    policy, _ = tiny(architecture, head_dim=16)
    batch.masks.clear()
    with torch.no_grad():
        expected = policy.hidden(batch)
        batch.masks.clear()
        monkeypatch.setitem(attention.BACK_ENDS, "cpu", attention_flex.attend)
        said = policy.hidden(batch)
    batch.masks.clear()
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)
