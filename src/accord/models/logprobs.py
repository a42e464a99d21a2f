"""Per-token log-probabilities from hidden states, in chunks of rows: [tokens × vocabulary] never stands in memory.

N = rows (one per token that carries loss), D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from accord.models.gradients import gradient_sum

__all__ = ["CONSTANT_STATISTICS", "Head", "kept_logits", "token_logprobs"]

CONSTANT_STATISTICS = frozenset({"log_sum_squares", "constant_entropy"})
"""Statistics of the head without a gradient; the others, `mean_logprob` and `entropy`, have one."""

_CHUNK_BYTES = 16 << 20
"""Float32 logits of one chunk. Larger ones are no faster and leave larger holes in the heap."""
_KEEP_BYTES = 256 << 20
"""Logits up to this size are kept for backward; larger ones are computed again (a fourth product instead of three)."""
_ROUND = 32
"""N is rounded up to a multiple of this: oneDNN keeps what it has prepared for every shape that it meets."""
_TABLE_ROWS = 8192
"""Rows of the head whose gradient is computed at once."""


class Head:
    """The language-model head: logits = cap(scale · (h Wᵀ + b))."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, *, scale: float = 1.0, softcap: float | None = None):
        self.weight_VD, self.bias_V, self.scale, self.softcap = weight_VD, bias_V, scale, softcap

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in the precision of autocast, or of the weight."""
        weight, bias = _cast(self.weight_VD, hidden_ND), self.bias_V
        return _logits(hidden_ND.to(weight.dtype), weight, bias, self.scale, self.softcap)

    def at(self, temperature: float) -> Head:
        """The head whose logits are divided by `temperature`, after the cap."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return Head(self.weight_VD, self.bias_V, scale=self.scale / temperature, softcap=softcap)

    def shape(self, product_NV: Tensor) -> Tensor:
        """Logits from the product h Wᵀ + b, where that was computed elsewhere."""
        return _shape(product_NV, self.scale, self.softcap)


def token_logprobs(
    head: Head, hidden_ND: Tensor, target_N: Tensor, statistics: Collection[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """log p(target | hidden) [N], float32, in nats; differentiable in the hidden states and the head.

    Args:
        statistics: what else is wanted of the distribution p over the vocabulary, [N] each, from the same logits:
            `log_sum_squares`, log Σ_v p(v)² (a constant), `mean_logprob`, the mean of log p(v) (differentiable),
            `entropy`, −Σ_v p(v)·log p(v) in nats (differentiable), and `constant_entropy`, the same as a constant.
    """
    names = tuple(sorted(statistics))
    weight_VD = _cast(head.weight_VD.detach(), hidden_ND)
    count = len(target_N)
    idle = -count % _ROUND
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logprobs_N, *others = _TokenLogprobs.apply(
            torch.nn.functional.pad(hidden_ND.to(weight_VD.dtype), (0, 0, 0, idle)),
            head.weight_VD,
            weight_VD,
            head.bias_V,
            torch.nn.functional.pad(target_N, (0, idle)),
            head.scale,
            head.softcap,
            names,
        )
    return logprobs_N[:count], {name: values[:count] for name, values in zip(names, others, strict=True)}


def kept_logits(rows: int, vocabulary: int, precision: torch.dtype) -> int:
    """Bytes of logits that are kept for backward: all, or none where they are computed again."""
    size = rows * vocabulary * precision.itemsize
    return size if size <= _KEEP_BYTES else 0


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        table_VD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        scale: float,
        softcap: float | None,
        names: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        normaliser_N = torch.empty_like(logprobs_N)
        others = {name: torch.empty_like(logprobs_N) for name in names}
        keep = kept_logits(len(hidden_ND), len(weight_VD), weight_VD.dtype) > 0 and any(ctx.needs_input_grad)
        kept_NV = _logits(hidden_ND, weight_VD, bias_V, scale, softcap) if keep else None
        for rows in _chunks(len(hidden_ND), weight_VD.shape[0]):
            logits = _logits(hidden_ND[rows], weight_VD, bias_V, scale, softcap) if kept_NV is None else kept_NV[rows]
            normaliser_N[rows] = torch.logsumexp(logits.float(), dim=-1)
            logprobs_N[rows] = logits.gather(1, target_N[rows, None])[:, 0].float() - normaliser_N[rows]
            for name, values_N in others.items():
                values_N[rows] = _STATISTICS[name](logits.float(), normaliser_N[rows])
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, normaliser_N, others.get("entropy"))
        ctx.kept_NV, ctx.scale, ctx.softcap, ctx.table_VD = kept_NV, scale, softcap, table_VD
        ctx.place = {name: place for place, name in enumerate(names, start=1)}
        ctx.mark_non_differentiable(*(others[name] for name in names if name in CONSTANT_STATISTICS))
        return logprobs_N, *others.values()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """∂ℓ/∂z = onehot(target) − softmax(z), then through the cap, the scale and the product.

        The mean of log p over the vocabulary differs in its first term only: 1/V everywhere. The entropy H has
        ∂H/∂z = −p·(log p + H).
        """
        hidden_ND, weight_VD, bias_V, target_N, normaliser_N, entropy_N = ctx.saved_tensors
        grad_N, slope_NV = grads[0], ctx.kept_NV
        mean_N = grads[ctx.place["mean_logprob"]] if "mean_logprob" in ctx.place else None
        spread_N = grads[ctx.place["entropy"]] if "entropy" in ctx.place else None
        both_N = grad_N if mean_N is None else grad_N + mean_N
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        grad_hidden = torch.empty_like(hidden_ND)
        sum_VD, grad_table = gradient_sum(ctx.table_VD) if ctx.needs_input_grad[1] else (None, None)
        for rows in _chunks(len(hidden_ND), weight_VD.shape[0]):
            logits = (
                _logits(hidden_ND[rows], weight_VD, bias_V, ctx.scale, ctx.softcap)
                if slope_NV is None
                else slope_NV[rows]
            )
            slope = logits.float() - normaliser_N[rows, None]
            if spread_N is None:
                slope.exp_().mul_(-both_N[rows, None])
            else:
                p = slope.exp()
                slope.add_(entropy_N[rows, None]).mul_(-spread_N[rows, None]).sub_(both_N[rows, None]).mul_(p)
            if mean_N is not None:
                slope.add_(mean_N[rows, None] / slope.shape[1])
            slope.scatter_add_(1, target_N[rows, None], grad_N[rows, None])
            if ctx.softcap is not None:
                slope.mul_(1 - (logits.float() / ctx.softcap).square_())
            if ctx.scale != 1.0:
                slope.mul_(ctx.scale)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            if slope_NV is not None:
                slope_NV[rows] = slope  # the logits are not needed again: their memory holds the slopes
                continue
            slope = slope.to(weight_VD.dtype)
            grad_hidden[rows] = slope @ weight_VD
            _add_products(sum_VD, slope, hidden_ND[rows])
        ctx.kept_NV = None
        if slope_NV is not None:
            grad_hidden = slope_NV @ weight_VD
            _add_products(sum_VD, slope_NV, hidden_ND)
        return grad_hidden, grad_table, None, grad_bias, None, None, None, None


def _entropy(logits_NV: Tensor, normaliser_N: Tensor) -> Tensor:
    logp_NV = logits_NV - normaliser_N[:, None]
    return -torch.linalg.vecdot(logp_NV.exp(), logp_NV)


_STATISTICS = {
    "constant_entropy": _entropy,
    "entropy": _entropy,
    "log_sum_squares": lambda logits_NV, normaliser_N: torch.logsumexp(2 * logits_NV, dim=-1) - 2 * normaliser_N,
    "mean_logprob": lambda logits_NV, normaliser_N: logits_NV.mean(-1) - normaliser_N,
}


def _add_products(sum_VD: Tensor | None, slope_NV: Tensor, hidden_ND: Tensor) -> None:
    """Add slopeᵀ · hidden, a part of the vocabulary at a time: no second matrix of the table's size."""
    if sum_VD is not None:
        for start in range(0, len(sum_VD), _TABLE_ROWS):
            part = slice(start, start + _TABLE_ROWS)
            sum_VD[part] += slope_NV[:, part].T @ hidden_ND


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    product = torch.nn.functional.linear(hidden, weight, bias.to(weight.dtype) if bias is not None else None)
    return _shape(product, scale, softcap)


def _shape(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return torch.tanh(logits / softcap) * softcap if softcap is not None else logits


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _cast(weight: Tensor, like: Tensor) -> Tensor:
    device = like.device.type
    return weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight
