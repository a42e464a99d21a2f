"""Logits to tokens: bias, temperature, truncation, and the inverse of the cumulative distribution at one random number.

Drawing a random number per token of the vocabulary, as `multinomial` does, costs more than the whole network of a small
model on a CPU; one per row is enough. Every row is computed by itself: the others cannot change it.

M = rows, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accord.errors import ModelError
from accord.models.native import Native, native

__all__ = ["Choice", "Shaping", "choose", "invert", "thresholds"]

_BLOCK = 256
"""Probabilities are summed in blocks: only the block that is hit is summed up token by token."""
_PREFIX = 128
"""Most likely tokens that are sorted first; the vocabulary is sorted only where they hold less than top_p."""


@dataclass(frozen=True, slots=True, eq=False)
class Shaping:
    """Per row: temperature (0 is greedy), top_p (1 keeps all), top_k (0 keeps all) and min_p (0 keeps all)."""

    temperature_M: Tensor
    top_p_M: Tensor
    top_k_M: Tensor
    min_p_M: Tensor
    bias: tuple[Tensor, Tensor, Tensor] | None = None
    """Rows, tokens and the numbers that are added to their logits."""

    def is_cut(self) -> Tensor:
        """Rows of which not all tokens are kept."""
        return (self.top_p_M < 1) | (self.top_k_M > 0) | (self.min_p_M > 0)

    def is_plain(self) -> Tensor:
        """Rows with a temperature and nothing else."""
        plain_M = (self.temperature_M > 0) & ~self.is_cut()
        return plain_M if self.bias is None else plain_M.index_fill(0, self.bias[0], False)

    def rows(self, rows: Tensor) -> Shaping:
        """Of these rows alone."""
        bias = None
        if self.bias is not None:
            place_B, own_B = torch.nonzero(self.bias[0][:, None] == rows)[:, 1], torch.isin(self.bias[0], rows)
            bias = (place_B, self.bias[1][own_B], self.bias[2][own_B]) if len(place_B) else None
        return Shaping(self.temperature_M[rows], self.top_p_M[rows], self.top_k_M[rows], self.min_p_M[rows], bias)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A token per row, with its log-probability as sampled (0 if greedy) and at temperature 1, untruncated; float32."""

    tokens_M: Tensor
    logprobs_M: Tensor
    raw_logprobs_M: Tensor


def choose(logits_MV: Tensor, uniform_M: Tensor, shaping: Shaping) -> Choice:
    """Sample one token per row.

    Args:
        uniform_M: float64 in [0, 1), one per row.

    Raises:
        ModelError: the logits of a row are not finite.
    """
    kernels = native() if logits_MV.device.type == "cpu" and Native.takes(logits_MV.dtype) else None
    if kernels is None:
        return _choose_shaped(logits_MV, uniform_M, shaping)
    # Row by row, not for all at once: how a token is found must not depend on what else is in the batch.
    plain_M = shaping.is_plain()
    if bool(plain_M.all()):
        choice = Choice(*kernels.choose(logits_MV.contiguous(), uniform_M, shaping.temperature_M))
        _check(choice.raw_logprobs_M)
        return choice
    if not bool(plain_M.any()):
        return _choose_shaped(logits_MV, uniform_M, shaping)
    rows = [torch.nonzero(mask_M)[:, 0] for mask_M in (plain_M, ~plain_M)]
    choices = [choose(logits_MV[row], uniform_M[row], shaping.rows(row)) for row in rows]
    order = torch.argsort(torch.cat(rows))
    return Choice(*(torch.cat([getattr(each, name) for each in choices])[order] for name in Choice.__slots__))


def _choose_shaped(logits_MV: Tensor, uniform_M: Tensor, shaping: Shaping) -> Choice:
    """`choose` by torch's functions, for any shaping."""
    greedy_M = shaping.temperature_M == 0
    said_MV = logits_MV = logits_MV.float()
    if shaping.bias is not None:
        rows, tokens, numbers = shaping.bias
        logits_MV = logits_MV.index_put((rows, tokens), numbers, accumulate=True)
    shaped_MV = logits_MV
    if not bool((greedy_M | (shaping.temperature_M == 1)).all()):
        temperature_M1 = torch.where(greedy_M, 1.0, shaping.temperature_M)[:, None]
        # The largest logit becomes 0 first: however small the temperature, nothing overflows to +inf.
        shaped_MV = (logits_MV - logits_MV.amax(-1, keepdim=True)) / temperature_M1
    cut = torch.nonzero(shaping.is_cut())[:, 0]
    if len(cut):
        lowest_M = shaped_MV.new_full((len(shaped_MV),), float("-inf"))
        kept = (shaping.top_p_M[cut], shaping.top_k_M[cut], shaping.min_p_M[cut])
        lowest_M[cut] = thresholds(shaped_MV[cut], *kept)
        shaped_MV = shaped_MV.masked_fill(shaped_MV < lowest_M[:, None], float("-inf"))
    probabilities_MV = torch.softmax(shaped_MV, dim=-1)
    _check(probabilities_MV.sum(-1))
    tokens_M = invert(probabilities_MV, uniform_M)
    if bool(greedy_M.any()):
        tokens_M = torch.where(greedy_M, logits_MV.argmax(-1), tokens_M)
    logprobs_M = probabilities_MV.gather(1, tokens_M[:, None])[:, 0].log()
    raw_logprobs_M = logprobs_M
    if shaped_MV is not said_MV:
        raw_logprobs_M = torch.log_softmax(said_MV, dim=-1).gather(1, tokens_M[:, None])[:, 0]
    return Choice(tokens_M, torch.where(greedy_M, 0.0, logprobs_M), raw_logprobs_M)


def _check(numbers_M: Tensor) -> None:
    if not bool(torch.isfinite(numbers_M).all()):
        fix = "The weights are damaged, or the learning rate was too high; try precision float32."
        raise ModelError("The model's logits are not finite numbers.", fix=fix)


def invert(weights_MV: Tensor, uniform_M: Tensor) -> Tensor:
    """The first token whose cumulative share exceeds the row's random number; never one of weight 0.

    Args:
        weights_MV: float32, not negative, each row with a positive sum; need not sum to 1.
        uniform_M: float64 in [0, 1).
    """
    padding = -weights_MV.shape[1] % _BLOCK
    if padding:
        weights_MV = torch.nn.functional.pad(weights_MV, (0, padding))
    blocks_MBC = weights_MV.view(len(weights_MV), -1, _BLOCK)
    sums_MB = blocks_MBC.sum(-1).double()
    cumulative_MB = sums_MB.cumsum(-1)
    block_M1, before_M1 = _first_above(cumulative_MB, uniform_M[:, None] * cumulative_MB[:, -1:])
    rest_M1 = uniform_M[:, None] * cumulative_MB[:, -1:] - before_M1
    hit_MC = blocks_MBC[torch.arange(len(blocks_MBC), device=blocks_MBC.device), block_M1[:, 0]]
    inside_M1, _ = _first_above(hit_MC.double().cumsum(-1), rest_M1.clamp(min=0))
    return (block_M1 * _BLOCK + inside_M1)[:, 0]


def _first_above(cumulative_MN: Tensor, target_M1: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative sum exceeds the target, and the sum before it.

    Rounding may put the target at the very end, where no sum exceeds it; so it is kept below the last one. The sum
    rises at the index returned, so its weight is not 0.
    """
    last_M1 = cumulative_MN[:, -1:]
    index_M1 = torch.searchsorted(
        cumulative_MN, torch.minimum(target_M1, torch.nextafter(last_M1, torch.zeros_like(last_M1))), right=True
    )
    before_M1 = torch.where(index_M1 > 0, cumulative_MN.gather(1, (index_M1 - 1).clamp(min=0)), 0.0)
    return index_M1, before_M1


def thresholds(logits_MV: Tensor, top_p_M: Tensor, top_k_M: Tensor, min_p_M: Tensor) -> Tensor:
    """The lowest logit that is kept: the top_k most likely tokens, of these the fewest that hold top_p of their mass.

    And of these the ones at least min_p times as likely as the most likely one. Tokens that tie with the last one kept
    are kept, too, so the result does not depend on the order of sorting.
    """
    size = logits_MV.shape[1]
    prefix_MN = logits_MV.topk(min(size, max(_PREFIX, int(top_k_M.max()))), dim=-1).values
    last_M1 = (top_k_M.clamp(max=size) - 1).clamp(min=0)[:, None]
    kth_M = torch.where(top_k_M > 0, prefix_MN.gather(1, last_M1)[:, 0], float("-inf"))
    highest_M1 = prefix_MN[:, :1]
    mass_MV = (logits_MV - highest_M1).exp().masked_fill(logits_MV < kth_M[:, None], 0.0)
    wanted_M = top_p_M * mass_MV.sum(-1, dtype=torch.float64)
    lowest_M, held_M = _cut(prefix_MN, wanted_M)
    short = torch.nonzero(~held_M & (top_p_M < 1))[:, 0]
    if len(short) and prefix_MN.shape[1] < size:
        lowest_M[short] = _cut(logits_MV[short].sort(dim=-1, descending=True).values, wanted_M[short])[0]
    lowest_M = torch.maximum(torch.where(top_p_M < 1, lowest_M, float("-inf")), kth_M)
    return torch.maximum(lowest_M, highest_M1[:, 0] + min_p_M.log())


def _cut(sorted_MN: Tensor, wanted_M: Tensor) -> tuple[Tensor, Tensor]:
    """The logit at which the mass of a falling prefix reaches what is wanted, and whether it does."""
    cumulative_MN = (sorted_MN - sorted_MN[:, :1]).exp().double().cumsum(-1)
    index_M1 = torch.searchsorted(cumulative_MN, wanted_M[:, None])
    held_M = index_M1[:, 0] < sorted_MN.shape[1]
    return sorted_MN.gather(1, index_M1.clamp(max=sorted_MN.shape[1] - 1))[:, 0], held_M
