"""Branch attention: every completion attends to its prompt and to itself, causally, and to nothing else.

Registered through transformers' attention interface under the name `accord` (in `accord.models.load`), so no model is
patched. The model is called as ``body(input_ids, position_ids, batch=micro_batch)`` and hands `batch` down to
`branch_attention`. On CUDA FlexAttention does the work (`accord.models.attention_flex`), elsewhere products here.

The products are batched per key/value head with its query heads side by side (no key is repeated). For the lengths of
preference data this is 3 to 4 times faster in bfloat16 on a CPU, forward and backward, than one fused
scaled-dot-product call per segment.

T = packed tokens, H = query heads, K = key/value heads, R = H / K, D = head size, L = query rows, S = key columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accord.errors import ModelError
from accord.models import attention_flex
from accord.models.kv_cache import Decode, Extension, Prefill
from accord.models.packing import MicroBatch, Span, TreeLayout

__all__ = ["ATTENTION", "branch_attention", "kept_cells", "no_mask"]

ATTENTION = "accord"

_BLOCK = 256
"""Query rows per product: later columns of a causal block are skipped, not masked."""
_KEEP = 256 * 512
"""Attention weights of at most this many (row, column) cells are kept for backward; larger ones are computed again."""
_ROUND = 32
"""Rows and columns of a product are rounded up to a multiple of this. oneDNN keeps what it has prepared for every shape
that it meets, about 300 kB each: without rounding a run grows by tens of MB per step."""


def branch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  (part of the interface; the layout is the mask)
    *,
    batch: MicroBatch | Prefill | Extension | Decode,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row of prompt trees.

    A sampler hands in a `Prefill` (keys and values are recorded, too), an `Extension` (tokens behind sequences that it
    has kept), or a `Decode` (one token of each of M sequences, against its cache: query [M, H, 1, D], key and value
    [M, K, 1, D], result [M, 1, H, D]).

    Args:
        query: [1, H, T, D]; key and value: [1, K, T, D], positions already applied.
        sliding_window: a token sees itself and this many minus one before it.
        softcap: scores are replaced by softcap · tanh(score / softcap) (Gemma 2).

    Returns:
        [1, T, H, D], and None for the weights.
    """
    if dropout:
        raise ModelError("Attention dropout is not supported.", fix="Load models through accord.models.load.")
    if other.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} uses attention sinks, which branch attention does not support.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    device = query.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (states.to(precision) for states in (query, key, value))
    with torch.autocast(device, enabled=False):
        if isinstance(batch, Decode):
            return batch.attend(module, query, key, value, scale, sliding_window, softcap), None
        if isinstance(batch, Extension):
            return _extend(module, query[0], key[0], value[0], batch, scale, sliding_window, softcap)[None], None
        if isinstance(batch, Prefill):
            batch.states[module] = key[0], value[0]
            batch = batch.row
        attend = BACK_ENDS.get(device, _attend)
        attended = attend(query[0], key[0], value[0], batch, scale, sliding_window, softcap)
    return attended[None], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: MicroBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    attended: Tensor = _BranchAttention.apply(query, key, value, batch, scale, window, softcap)
    return attended


def _extend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: Extension,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of new tokens to kept sequences, and what is then kept of them: [T, H, D], zero behind the last."""
    H, T, _ = query.shape
    attended_THD = value.new_zeros(T, H, value.shape[-1])
    start = 0
    for kept, length, states in zip(batch.kept, batch.lengths, batch.states, strict=True):
        new = slice(start, start + length)
        states[module] = kept.behind(module, key[:, new], value[:, new])
        keys, values = (torch.cat(pair, dim=1) for pair in zip(kept.prompt(module), states[module], strict=True))
        before = keys.shape[1] - length
        for rows, seen in _causal(Span(0, length)):
            block = _Block(Span(start + rows.start, rows.length), (Span(0, before + seen.length),))
            q, k, v = _states(query, keys, values, block)
            weights, _ = _weights(q, k, batch, block, scale, window, softcap)
            attended_THD[start + rows.start :][: rows.length] = _join(torch.bmm(weights, v), H)[: rows.length]
        start += length
    return attended_THD


BACK_ENDS: dict[str, Callable[..., Tensor]] = {"cuda": attention_flex.attend}
"""How a packed row is attended to, by type of device; everywhere else by products."""


class _BranchAttention(torch.autograd.Function):
    """Softmax attention, block by block; backward by the usual formulas (Dao et al. 2022, appendix B)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: MicroBatch,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        H, T, _ = query.shape
        attended_THD = value.new_empty(T, H, value.shape[-1])  # latent attention: values narrower than keys
        kept: list[Tensor | None] = []
        for block in _blocks(batch):
            rows = block.rows
            q, k, v = _states(query, key, value, block)
            weights, slope = _weights(q, k, batch, block, scale, window, softcap)
            attended_THD[rows.start : rows.start + rows.length] = _join(torch.bmm(weights, v), H)[: rows.length]
            keep = slope is None and block.cells <= _KEEP and any(ctx.needs_input_grad)
            kept.append(weights if keep else None)
        # Saved with the others: activation checkpointing lets go of what is saved, and only of that.
        ctx.save_for_backward(query, key, value, *kept)
        ctx.settings = batch, scale, window, softcap
        return attended_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        batch, scale, window, softcap = ctx.settings
        H = query.shape[0]
        grad_THD = grads[0]
        grad_q, grad_k, grad_v = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block, seen in zip(_blocks(batch), kept, strict=True):
            rows, columns = block.rows, block.columns
            q, k, v = _states(query, key, value, block)
            weights, slope = (seen, None) if seen is not None else _weights(q, k, batch, block, scale, window, softcap)
            grad = _split(grad_THD.transpose(0, 1), block, key.shape[0])
            grad_weights = torch.bmm(grad, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if slope is not None:
                grad_scores = grad_scores * slope
            grad_rows = torch.bmm(grad_scores, k).mul_(scale)
            grad_q[:, rows.start : rows.start + rows.length] = _join(grad_rows, H)[: rows.length].transpose(0, 1)
            _scatter(grad_k, torch.bmm(grad_scores.transpose(1, 2), q).mul_(scale), columns)
            _scatter(grad_v, torch.bmm(weights.transpose(1, 2), grad), columns)
        return grad_q, grad_k, grad_v, None, None, None, None


@dataclass(frozen=True, slots=True)
class _Block:
    """Query rows, and the key columns of which they may see some: all of a small `tree`, else a causal piece of it."""

    rows: Span
    columns: tuple[Span, ...]
    tree: TreeLayout | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product, rounded up."""
        return _rounded(self.rows.length), _rounded(sum(span.length for span in self.columns))

    @property
    def cells(self) -> int:
        return self.shape[0] * self.shape[1]


def _rounded(length: int) -> int:
    return -(-length // _ROUND) * _ROUND


def kept_cells(batch: MicroBatch) -> int:
    """How many attention weights of each query head are kept for backward (none where there is a soft cap)."""
    return sum(block.cells for block in _blocks(batch) if block.cells <= _KEEP)


def _blocks(batch: MicroBatch) -> Iterator[_Block]:
    """A tree that fits one block is one masked product; a larger one is cut so that what is hidden is skipped."""
    for tree in batch.layout:
        length = tree.prompt.length + sum(branch.length for branch in tree.branches)
        if length <= _BLOCK:
            whole = Span(tree.prompt.start, length)
            yield _Block(whole, (whole,), tree)
            continue
        for rows, seen in _causal(tree.prompt):
            yield _Block(rows, (seen,))
        before = (tree.prompt,) if tree.prompt.length else ()
        for branch in tree.branches:
            for rows, seen in _causal(branch):
                yield _Block(rows, (*before, seen))


def _causal(segment: Span) -> Iterator[tuple[Span, Span]]:
    for start in range(0, segment.length, _BLOCK):
        length = min(_BLOCK, segment.length - start)
        yield Span(segment.start + start, length), Span(segment.start, start + length)


def _states(query: Tensor, key: Tensor, value: Tensor, block: _Block) -> tuple[Tensor, Tensor, Tensor]:
    """[K, R·L, D], [K, S, D], [K, S, D]; rows and columns that only round up are zero."""
    q = _split(query, block, key.shape[0])
    return q, _gather(key, block.columns, block.shape[1]), _gather(value, block.columns, block.shape[1])


def _split(states_HTD: Tensor, block: _Block, kv_heads: int) -> Tensor:
    """[H, T, D] to [K, R·L, D]: the query heads that share a key head stand one after the other."""
    heads, _, size = states_HTD.shape
    rows_HLD = _gather(states_HTD, (block.rows,), block.shape[0])
    return rows_HLD.reshape(kv_heads, heads // kv_heads * block.shape[0], size)


def _join(attended: Tensor, heads: int) -> Tensor:
    """[K, R·L, D] to [L, H, D]."""
    return attended.view(heads, -1, attended.shape[-1]).transpose(0, 1)


def _gather(states_HTD: Tensor, spans: tuple[Span, ...], length: int) -> Tensor:
    """[H, length, D]: the rows of `spans`, then zeros."""
    pieces = [states_HTD[:, span.start : span.start + span.length] for span in spans]
    missing = length - sum(span.length for span in spans)
    if missing:
        pieces.append(states_HTD.new_zeros(()).expand(states_HTD.shape[0], missing, states_HTD.shape[2]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _scatter(grad_KTD: Tensor, grad_KSD: Tensor, columns: tuple[Span, ...]) -> None:
    offset = 0
    for span in columns:
        grad_KTD[:, span.start : span.start + span.length] += grad_KSD[:, offset : offset + span.length]
        offset += span.length


def _weights(
    q: Tensor,
    k: Tensor,
    batch: MicroBatch | Extension,
    block: _Block,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention weights [K, R·L, S], and the slope of the soft cap where there is one."""
    mask = _mask(batch, block, q.shape[1] // block.shape[0], window, q)
    if softcap is None:
        return torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale), dim=-1), None
    bent = torch.tanh(torch.bmm(q, k.transpose(1, 2)).mul_(scale / softcap))
    return torch.softmax(bent * softcap + mask, dim=-1), 1 - bent * bent


def _mask(batch: MicroBatch | Extension, block: _Block, repeat: int, window: int | None, like: Tensor) -> Tensor:
    """Additive mask [1, R·L, S], made once for all layers and all blocks of one shape."""
    total = sum(span.length for span in block.columns)
    lengths = tuple(span.length for span in (block.tree.prompt, *block.tree.branches)) if block.tree else None
    key = (block.rows.length, total, lengths, repeat, window, like.dtype)
    if key not in batch.masks:
        visible = _visible_in_tree(lengths, window) if lengths else _visible(block.rows.length, total, window)
        mask = torch.full(block.shape, float("-inf"))
        mask[block.rows.length :, 0] = 0.0  # a row that only rounds up sees something, or its softmax were not a number
        mask[: block.rows.length, :total].masked_fill_(visible, 0.0)
        batch.masks[key] = mask.to(like).repeat(repeat, 1)[None]
    return batch.masks[key]


def _visible(length: int, total: int, window: int | None) -> Tensor:
    """[L, S]: the last row sees all S columns, each row before it one less, at most `window` of them."""
    row = torch.arange(total - length, total)[:, None]
    column = torch.arange(total)[None]
    return (column <= row) & (column > row - window) if window is not None else column <= row


def _visible_in_tree(lengths: tuple[int, ...], window: int | None) -> Tensor:
    """[L, L] for a prompt and its branches side by side: a branch sees the prompt and itself, by position."""
    prompt, *branches = lengths
    position = torch.cat([torch.arange(prompt), *(prompt + torch.arange(length) for length in branches)])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (owner[None] == 0) | (owner[None] == owner[:, None])
    visible &= position[None] <= position[:, None]
    return visible & (position[None] > position[:, None] - window) if window is not None else visible


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout of the batch is the mask: transformers builds none."""
