"""A linear layer that casts its weights twice instead of keeping the copy: autocast's own numbers, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accord.models.fuse import Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_values_and_gradients_are_autocasts_own(bias, dtype, frozen):
    torch.manual_seed(0)
    plain = nn.Linear(48, 32, bias=bias).requires_grad_(not frozen)
    own = Linear(plain)
    assert own.weight is plain.weight
    states = torch.randn(2, 7, 48).to(dtype)
    found = []
    for module in (plain, own):
        hidden = states.clone().requires_grad_()
        for parameter in plain.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = module(hidden)
        assert out.dtype == torch.bfloat16
        (out.float() ** 2).sum().backward()
        found.append([out, hidden.grad, *(p.grad for p in plain.parameters() if not frozen)])
        assert hidden.grad.dtype == dtype
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_no_copy_of_the_weights_is_kept_for_backward():
    layer = Linear(nn.Linear(512, 512))
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with hooks, torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(3, 512, requires_grad=True))
    others = [tensor for tensor in kept if tensor.data_ptr() != layer.weight.data_ptr()]
    assert sum(tensor.nbytes for tensor in others) <= 3 * 512 * 4


def test_without_autocast_it_is_a_linear_layer():
    plain = nn.Linear(8, 4)
    states = torch.randn(5, 8)
    assert torch.equal(Linear(plain)(states), plain(states))
