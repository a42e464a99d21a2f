"""The gradient of a token table is what autograd would add up, wherever it is used."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accord.models.fuse import Embedding
from accord.models.logprobs import Head, token_logprobs


@given(
    ids=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    padding=st.sampled_from([None, 2]),
    steps=st.integers(1, 3),
)
def test_embedding_gradients_add_up_like_torchs(ids: list[int], padding: int | None, steps: int) -> None:
    """A token that occurs often adds often, the padding token never; several backward passes add up."""
    torch.manual_seed(0)
    plain = nn.Embedding(7, 3, padding_idx=padding)
    ours = Embedding(nn.Parameter(plain.weight.detach().clone()), padding)
    slope = torch.randn(len(ids), 3)
    for _ in range(steps):
        for module in (plain, ours):
            (module(torch.tensor(ids)) * slope).sum().backward()
    assert torch.equal(plain(torch.tensor(ids)), ours(torch.tensor(ids)))
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


def test_a_table_shared_by_embedding_and_head_gets_both_gradients() -> None:
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(50, 4))
    ids, targets = torch.tensor([3, 3, 9, 0]), torch.tensor([1, 3, 3, 49])
    token_logprobs(Head(table, None), Embedding(table, None)(ids), targets)[0].sum().backward()
    ours = table.grad
    table.grad = None
    logits = nn.functional.embedding(ids, table) @ table.T
    logits.log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(ours, table.grad)


def test_a_table_that_is_computed_passes_its_gradient_on() -> None:
    """The head of a merged or scaled table: the gradient reaches what it was computed from."""
    torch.manual_seed(0)
    base, targets = nn.Parameter(torch.randn(50, 4)), torch.tensor([1, 3])
    hidden = torch.randn(2, 4)
    token_logprobs(Head(2 * base, None), hidden, targets)[0].sum().backward()
    ours = base.grad
    base.grad = None
    (hidden @ (2 * base).T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(ours, base.grad)
