"""The chunked head against torch's own autograd, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accord.models import logprobs
from accord.models.logprobs import Head, token_logprobs


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, cap: float | None
) -> Tensor:
    return distribution(hidden, weight, bias, scale, cap)[torch.arange(len(target)), target]


def distribution(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """log p over the vocabulary: [N, V]."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits, -1)


def leaves(rows: int, size: int, vocabulary: int, *, bias: bool, seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, size), (vocabulary, size), *([(vocabulary,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return tensors, torch.randint(vocabulary, (rows,), generator=generator)


@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 12),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, 2.0]),
    cap=st.sampled_from([None, 1.5, 30.0]),
    chunk=st.integers(1, 10),
    keep=st.booleans(),
    mean=st.booleans(),
    entropy=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_values_and_gradients_equal_autograd(
    rows: int,
    vocabulary: int,
    bias: bool,
    scale: float,
    cap: float | None,
    chunk: int,
    keep: bool,
    mean: bool,
    entropy: bool,
    seed: int,
) -> None:
    (hidden, weight, *more), target = leaves(rows, 5, vocabulary, bias=bias, seed=seed)
    inputs = [hidden, weight, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_CHUNK_BYTES", 4 * vocabulary * chunk)
        patch.setattr(logprobs, "_KEEP_BYTES", 1 << 30 if keep else 0)
        head = Head(weight, more[0] if more else None, scale=scale, softcap=cap)
        wanted = [name for name, on in (("mean_logprob", mean), ("entropy", entropy)) if on]
        values, others = token_logprobs(head, hidden, target, wanted)
        upstream = torch.cos(torch.arange(rows).float())
        values = values + (0.7 + upstream) * others["mean_logprob"] if mean else values
        values = values + (0.3 - upstream) * others["entropy"] if entropy else values
        gradients = torch.autograd.grad((values * upstream).sum(), inputs)
    expected = reference(hidden, weight, more[0] if more else None, target, scale, cap)
    whole = distribution(hidden, weight, more[0] if more else None, scale, cap)
    if mean:
        expected = expected + (0.7 + upstream) * whole.mean(-1)
    if entropy:
        expected = expected - (0.3 - upstream) * (whole.exp() * whole).sum(-1)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    for gradient, exact in zip(gradients, torch.autograd.grad((expected * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, exact, atol=1e-5, rtol=1e-4)


def test_gradient_of_the_hidden_states_by_finite_differences() -> None:
    """Central differences in float32 with h = 0.01: truncation h²/6·f''' and rounding 1e-6/h stay below 1e-3."""
    (hidden, weight, bias), target = leaves(3, 4, 7, bias=True, seed=1)
    head = Head(weight, bias, scale=0.7, softcap=3.0)
    (gradient,) = torch.autograd.grad(token_logprobs(head, hidden, target)[0].sum(), hidden)
    step = 1e-2
    with torch.no_grad():
        for i in range(3):
            for j in range(4):
                shift = torch.zeros(3, 4)
                shift[i, j] = step
                above, below = (token_logprobs(head, moved, target)[0] for moved in (hidden + shift, hidden - shift))
                difference = above - below
                assert float(difference.sum()) / (2 * step) == pytest.approx(float(gradient[i, j]), abs=1e-3)


def test_two_tokens_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4 and 3/4. ∂ℓ(second)/∂logits = (−1/4, 1/4)."""
    weight = torch.eye(2, requires_grad=True)
    hidden = torch.tensor([[0.0, 3.0]]).log().nan_to_num(neginf=0.0).requires_grad_()
    values, _ = token_logprobs(Head(weight, None), hidden, torch.tensor([1]))
    assert values.tolist() == pytest.approx([-0.2876821])
    (gradient,) = torch.autograd.grad(values.sum(), hidden)
    assert gradient.tolist()[0] == pytest.approx([-0.25, 0.25])


def test_huge_logits_stay_finite() -> None:
    values, _ = token_logprobs(Head(torch.eye(3) * 1e4, None), torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([2]))
    assert values.tolist() == [-20000.0]


def test_a_frozen_head_gets_no_gradient() -> None:
    (hidden, weight), target = leaves(2, 3, 4, bias=False, seed=0)
    weight.requires_grad_(False)
    token_logprobs(Head(weight, None), hidden, target)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_logits_are_those_of_the_log_probabilities() -> None:
    """What a sampler reads (`Head.logits`) is what training scores."""
    (hidden, weight, bias), target = leaves(4, 5, 6, bias=True, seed=3)
    head = Head(weight, bias, scale=0.5, softcap=2.0)
    expected = torch.log_softmax(head.logits(hidden), -1)[torch.arange(4), target]
    torch.testing.assert_close(token_logprobs(head, hidden, target)[0], expected)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_a_temperature_divides_the_logits_after_the_cap(cap: float | None) -> None:
    (hidden, weight, bias), target = leaves(4, 5, 6, bias=True, seed=3)
    head = Head(weight, bias, scale=0.5, softcap=cap)
    expected = torch.log_softmax(head.logits(hidden) / 0.7, -1)[torch.arange(4), target]
    torch.testing.assert_close(token_logprobs(head.at(0.7), hidden, target)[0], expected)


def test_what_nobody_asks_for_is_not_kept() -> None:
    """Backward keeps one number per row more for the entropy, and nothing for what is constant."""

    def kept(*names: str) -> int:
        (hidden, weight), target = leaves(32, 3, 7, bias=False, seed=2)
        values, _ = token_logprobs(Head(weight, None), hidden, target, names)
        node = values.grad_fn.next_functions[0][0]
        return sum(tensor.numel() for tensor in node.saved_tensors if tensor is not None)

    assert kept("constant_entropy", "log_sum_squares") == kept()
    assert kept("entropy") == kept() + 32


def test_statistics_by_hand() -> None:
    """Probabilities ½, ¼, ¼: Σp² = ⅜, the mean of log p is −(log 2 + 2·log 4)/3 = −5/3·log 2, the entropy 3/2·log 2."""
    hidden = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    head, target = Head(torch.eye(3), None), torch.tensor([0])
    names = {"mean_logprob", "log_sum_squares", "entropy", "constant_entropy"}
    values, others = token_logprobs(head, hidden, target, names)
    assert others["entropy"].tolist() == pytest.approx([1.5 * math.log(2)])
    assert others["constant_entropy"].tolist() == others["entropy"].tolist()
    assert others["entropy"].requires_grad
    assert not others["constant_entropy"].requires_grad
    assert values.tolist() == pytest.approx([math.log(0.5)])
    assert others["log_sum_squares"].tolist() == pytest.approx([math.log(3 / 8)])
    assert others["mean_logprob"].tolist() == pytest.approx([-5 / 3 * math.log(2)])
    assert others["mean_logprob"].requires_grad
    assert not others["log_sum_squares"].requires_grad


def test_statistics_do_not_change_the_gradient() -> None:
    """Asked for and not used: the same bits."""
    gradients = []
    for names in ((), ("constant_entropy", "entropy", "log_sum_squares", "mean_logprob")):
        (hidden, weight), target = leaves(5, 3, 7, bias=False, seed=2)
        values, _ = token_logprobs(Head(weight, None), hidden, target, names)
        gradients.append(torch.autograd.grad(values.sum(), [hidden, weight]))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
