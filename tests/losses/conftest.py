"""Records from plain numbers, and slopes that two ways of computing agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.losses import LossOutput, PreferenceLogprobs

# Threads cost more than they bring where the models are tiny, most of all when tests run on every core.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pairs() -> Callable[..., PreferenceLogprobs]:
    """`pairs((c, r, c_ref, r_ref), …, lengths=(4, 2))` in float64, of weight 1 and without a tail."""

    def make(*rows: Sequence[float], lengths: Sequence[float] = (1, 1), **fields: Any) -> PreferenceLogprobs:
        chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = torch.tensor(rows, dtype=torch.float64).T
        one_B = torch.ones_like(chosen_B)
        columns = {
            "chosen_B": chosen_B,
            "rejected_B": rejected_B,
            "ref_chosen_B": ref_chosen_B,
            "ref_rejected_B": ref_rejected_B,
            "chosen_length_B": lengths[0] * one_B,
            "rejected_length_B": lengths[1] * one_B,
            "chosen_tail_B": 0 * one_B,
            "rejected_tail_B": 0 * one_B,
            "weight_B": one_B,
        }
        return PreferenceLogprobs(**columns | fields)

    return make


@pytest.fixture(scope="session")
def slope() -> Callable[..., float]:
    """∂loss/∂value by autograd, after it was compared with a central difference in float64."""

    def measure(function: Callable[[Tensor], LossOutput], value: float) -> float:
        leaf = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(leaf).loss.sum(), leaf)
        h = 1e-5
        with torch.no_grad():
            difference = float((function(leaf + h).loss - function(leaf - h).loss).sum()) / (2 * h)
        assert float(gradient) == pytest.approx(difference, abs=1e-7)
        return float(gradient)

    return measure
