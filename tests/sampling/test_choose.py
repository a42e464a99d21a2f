"""Choosing a token: the inverse of the cumulative distribution, and truncation by enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from accord.errors import ModelError
from accord.sampling.choose import Shaping, choose, invert, thresholds

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(0.0, 1.0, width=32), st.sampled_from([1e-45, 1e-38, 1e-8])),
    min_size=1,
    max_size=600,
).filter(lambda weights: sum(weights) > 0)
UNIFORM = st.one_of(st.floats(0.0, 1.0, exclude_max=True), st.just(np.nextafter(1.0, 0.0)), st.just(0.0))


def shaping(rows, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, bias=None):
    return Shaping(
        temperature_M=torch.full((rows,), float(temperature)),
        top_p_M=torch.full((rows,), float(top_p)),
        top_k_M=torch.full((rows,), int(top_k)),
        min_p_M=torch.full((rows,), float(min_p)),
        bias=bias,
    )


@given(WEIGHTS, UNIFORM)
@example([0.0] * 255 + [1.0] + [0.0] * 300, np.nextafter(1.0, 0.0))
@example([0.1] * 10 + [0.0] * 500, np.nextafter(1.0, 0.0))
@example([0.0, 1e-45, 0.0], 0.0)
def test_a_token_of_weight_zero_is_never_drawn(weights, uniform):
    token = int(invert(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64))[0])
    assert weights[token] > 0


@given(WEIGHTS, UNIFORM)
def test_the_token_is_the_one_whose_share_of_the_interval_holds_the_random_number(weights, uniform):
    """Against exact cumulative sums in float64, up to the rounding of float32 block sums (600 additions at most)."""
    token = int(invert(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64))[0])
    cumulative = np.cumsum(np.array(weights, np.float32).astype(np.float64))
    share = np.concatenate([[0.0], cumulative]) / cumulative[-1]
    assert share[token] - 1e-5 <= uniform <= share[token + 1] + 1e-5


def test_equally_spaced_random_numbers_draw_every_token_in_proportion():
    """1,000 numbers in the middle of equal intervals: counts are 1,000 times the probabilities, to one."""
    weights = torch.rand(700, generator=torch.Generator().manual_seed(0))
    middle = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = invert(weights.expand(1000, -1), middle)
    counts = torch.bincount(tokens, minlength=700)
    assert (counts - 1000 * weights / weights.sum()).abs().max() <= 1 + 1e-3


@pytest.mark.parametrize("vocabulary", [7, 300])
@pytest.mark.parametrize("top_k", [0, 1, 5, 200])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_what_is_kept_by_enumeration(vocabulary, top_k, top_p, min_p):
    """Flat rows make the first 128 hold less than top_p, so that the whole vocabulary is sorted."""
    generator = torch.Generator().manual_seed(vocabulary + top_k)
    logits = torch.randn(6, vocabulary, generator=generator) * torch.tensor([0.1, 0.1, 1.0, 1.0, 5.0, 5.0])[:, None]
    lowest = thresholds(logits, torch.full((6,), top_p), torch.full((6,), top_k), torch.full((6,), min_p))
    for row, low in zip(logits.double().numpy(), lowest.tolist(), strict=True):
        order = np.argsort(-row)[: top_k or None]
        mass = np.exp(row[order]) / np.exp(row[order]).sum()
        count = int(np.searchsorted(np.cumsum(mass), np.float32(top_p) - 1e-12)) + 1 if top_p < 1 else len(order)
        likely = np.exp(row) >= np.float32(min_p) * np.exp(row).max()
        assert set(np.flatnonzero(row >= low)) == set(order[:count]) & set(np.flatnonzero(likely))


def test_ties_with_the_last_token_kept_are_kept():
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    assert thresholds(logits, torch.tensor([1.0]), torch.tensor([2]), torch.tensor([0.0])).tolist() == [2.0]
    tokens = {int(choose(logits, _uniform(u), shaping(1, top_k=2)).tokens_M[0]) for u in np.linspace(0, 0.999, 50)}
    assert tokens == {0, 1, 2}


def test_logprobs_are_those_of_the_shaped_and_of_the_raw_distribution():
    """Temperature 0.5 of probabilities (0.5, 0.3, 0.2) squares them: (25, 9, 4) / 38; top 2 of these: (25, 9) / 34."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    choice = choose(logits, _uniform(0.999), shaping(1, temperature=0.5, top_k=2))
    assert choice.tokens_M.tolist() == [1]
    assert choice.logprobs_M.tolist() == pytest.approx([np.log(9 / 34)], abs=1e-6)
    assert choice.raw_logprobs_M.tolist() == pytest.approx([np.log(0.3)], abs=1e-6)


def test_rows_are_shaped_each_for_itself():
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((4,), 0.6, dtype=torch.float64)
    temperatures, top_ps, top_ks, min_ps = [0.0, 1.0, 0.7, 1.0], [1.0, 1.0, 0.3, 0.99], [0, 0, 0, 300], [0.0, 0.1, 0, 0]
    bias = (torch.tensor([1, 1, 3]), torch.tensor([5, 900, 7]), torch.tensor([6.0, -100.0, 3.0]))
    mixed = Shaping(*map(torch.tensor, (temperatures, top_ps, top_ks, min_ps)), bias)
    together = choose(logits, uniform, mixed)
    for row in range(4):
        one = slice(row, row + 1)
        mine = bias[0] == row
        own = (torch.zeros_like(bias[0][mine]), bias[1][mine], bias[2][mine]) if mine.any() else None
        alone = choose(
            logits[one],
            uniform[one],
            shaping(1, temperatures[row], top_ps[row], top_ks[row], min_ps[row], own),
        )
        assert alone.tokens_M[0] == together.tokens_M[row]
        torch.testing.assert_close(alone.logprobs_M[0], together.logprobs_M[row])
    assert together.tokens_M[0] == logits[0].argmax()
    assert together.logprobs_M[0] == 0


def test_min_p_keeps_what_is_likely_enough_after_the_temperature():
    """(0.5, 0.3, 0.2) at temperature 0.5 is (25, 9, 4) / 38: 9 is more than a third of 25, 4 is not."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    choice = choose(logits, _uniform(0.999), shaping(1, temperature=0.5, min_p=1 / 3))
    assert choice.tokens_M.tolist() == [1]
    assert choice.logprobs_M.tolist() == pytest.approx([np.log(9 / 34)], abs=1e-6)
    assert choose(logits, _uniform(0.999), shaping(1, min_p=1.0)).tokens_M.tolist() == [0]


def test_a_bias_moves_the_sampling_distribution_and_not_the_models():
    """log 6 on the last of (0.5, 0.3, 0.2): (5, 3, 12) / 20. The numbers given are left as they were."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    bias = (torch.tensor([0]), torch.tensor([2]), torch.tensor([float(np.log(6))]))
    before = logits.clone()
    sampled, greedy = (
        choose(logits, _uniform(0.5), shaping(1, bias=bias)),
        choose(logits, _uniform(0.5), shaping(1, temperature=0, bias=bias)),
    )
    assert sampled.tokens_M.tolist() == greedy.tokens_M.tolist() == [2]
    assert sampled.logprobs_M.tolist() == pytest.approx([np.log(12 / 20)], abs=1e-6)
    assert sampled.raw_logprobs_M.tolist() == greedy.raw_logprobs_M.tolist() == pytest.approx([np.log(0.2)], abs=1e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[1000.0, 999.0, -1000.0]])
    choice = choose(logits, _uniform(0.5), shaping(1, temperature=temperature))
    assert choice.tokens_M.tolist() == ([1] if temperature > 1 else [0])
    assert torch.isfinite(choice.logprobs_M).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ModelError, match="not finite"):
        choose(torch.tensor([[0.0, 1.0], [0.0, bad]]), torch.tensor([0.5, 0.5], dtype=torch.float64), shaping(2))


def _uniform(value):
    return torch.tensor([value], dtype=torch.float64)
