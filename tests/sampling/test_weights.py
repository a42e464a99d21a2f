"""Weights that are cast once give what autocast gives, and leave no trace."""

from __future__ import annotations

import torch
from torch import nn

from accord.models.fuse import Linear
from accord.sampling.weights import cast_linears


def test_products_are_those_of_autocast_and_the_layers_are_restored():
    torch.manual_seed(0)
    network = nn.Sequential(Linear(nn.Linear(64, 96)), nn.GELU(), Linear(nn.Linear(96, 32, bias=False)))
    states = torch.randn(5, 3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(states)
        with cast_linears(network, torch.bfloat16):
            assert all("forward" in vars(layer) for layer in (network[0], network[2]))
            torch.testing.assert_close(network(states), expected)
    assert all("forward" not in vars(layer) for layer in (network[0], network[2]))


def test_float32_is_left_alone():
    layer = Linear(nn.Linear(4, 4))
    with cast_linears(layer, torch.float32):
        assert "forward" not in vars(layer)


def test_layers_are_restored_after_an_error():
    layer = Linear(nn.Linear(4, 4))
    try:
        with cast_linears(layer, torch.bfloat16):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert "forward" not in vars(layer)
