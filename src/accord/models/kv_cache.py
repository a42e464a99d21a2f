"""The key/value cache of a sampler: one slot per live sequence, filled by packed prompts, extended a token at a time.

The model is called as always, ``body(input_ids, position_ids, batch=…)``; what `batch` is says what attention does:
a `Prefill` records the keys and values of packed prompts, a `Decode` extends and reads the slots of a `SlotCache`.
Attention reads the slots where they are, by products batched over (slot, key head) with the query heads of one key
head side by side: nothing is gathered, repeated or concatenated. For one query row this is 17 times faster on a CPU
than a fused scaled-dot-product call, provided that the slots are contiguous (or the product copies them first): so
the cache is only as long as its longest live sequence, rounded up, and keys are stored transposed.

M = slots of a step, H = query heads, K = key/value heads, R = H / K, D = head size, S = columns of the cache,
T = packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from accord.models.packing import MicroBatch, Span

__all__ = ["Decode", "Prefill", "SlotCache"]

_ROUND = 32
"""The cache grows by this many columns: often enough to read few idle ones, seldom enough to copy little."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """A packed row of prompts whose keys and values ([K, T, D] per attention module) are recorded."""

    row: MicroBatch
    states: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


class SlotCache:
    """Keys [slots, K, D, S] and values [slots, K, S, D] of every attention module, allocated by the first prompt."""

    def __init__(self, slots: int) -> None:
        self.slots, self.columns = slots, _ROUND
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def reserve(self, length: int) -> None:
        """Make the cache as long as sequences of `length` need, keeping what it holds up to there."""
        columns = -(-length // _ROUND) * _ROUND
        if columns == self.columns:
            return
        kept = min(columns, self.columns)
        for module, (keys, values) in self.layers.items():
            # Zeros: a masked column is multiplied by a weight of zero, and zero times garbage could be NaN.
            keys_ = keys.new_zeros(*keys.shape[:3], columns)
            values_ = values.new_zeros(*values.shape[:2], columns, values.shape[3])
            keys_[..., :kept], values_[:, :, :kept] = keys[..., :kept], values[:, :, :kept]
            self.layers[module] = keys_, values_
        self.columns = columns

    def enter(self, prefill: Prefill, span: Span, slots: slice) -> None:
        """Fork one prompt of a prefilled row into `slots`; its length must be reserved."""
        rows = slice(span.start, span.start + span.length)
        for module, (key, value) in prefill.states.items():
            if module not in self.layers:
                keys = key.new_zeros(self.slots, key.shape[0], key.shape[2], self.columns)
                values = value.new_zeros(self.slots, value.shape[0], self.columns, value.shape[2])
                self.layers[module] = keys, values
            keys, values = self.layers[module]
            keys[slots, :, :, : span.length] = key[:, rows].transpose(1, 2)
            values[slots, :, : span.length] = value[:, rows]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for keys, values in self.layers.values():
            keys[target, :, :, :length] = keys[source, :, :, :length]
            values[target, :, :length] = values[source, :, :length]


class Decode:
    """One token of each of slots 0 … M-1; token m stands at `positions_M[m]`, which must be reserved."""

    def __init__(self, cache: SlotCache, positions_M: Tensor) -> None:
        self.cache, self.positions_M = cache, positions_M
        # Made once per step, shared by all layers: where its states go, and what is hidden.
        self._indices: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store this step's key and value, [M, K, 1, D]; attend with query, [M, H, 1, D]. Returns [M, 1, H, D]."""
        M, H, _, D = query.shape
        K, E = key.shape[1], value.shape[3]
        keys, values = self.cache.layers[module]
        key_cells, value_rows = self._places(K, D)
        keys.view(-1).index_copy_(0, key_cells, key.reshape(-1))
        values.view(-1, E).index_copy_(0, value_rows, value.reshape(-1, E))
        keys_BDS = keys[:M].view(M * K, D, -1)
        query_BRD = (query * scale).reshape(M * K, H // K, D)
        scores_BRS = torch.bmm(query_BRD, keys_BDS)
        if softcap is not None:
            scores_BRS = torch.tanh(scores_BRS / softcap) * softcap
        weights_BRS = torch.softmax(scores_BRS.add_(self._mask(K, window, query.dtype)), dim=-1)
        return torch.bmm(weights_BRS, values[:M].view(M * K, -1, E)).view(M, 1, H, E)

    def _places(self, heads: int, size: int) -> tuple[Tensor, Tensor]:
        """Flat cells of this step's M · K · D key entries, and flat rows of its M · K values."""
        columns = self.cache.columns
        found = self._indices.get((heads, size, columns))
        if found is None:
            position_B = self.positions_M.repeat_interleave(heads)
            first_B = torch.arange(len(position_B), device=position_B.device)
            cell_BD = first_B[:, None] * size + torch.arange(size, device=position_B.device)
            found = (cell_BD * columns + position_B[:, None]).flatten(), first_B * columns + position_B
            self._indices[heads, size, columns] = found
        return found

    def _mask(self, heads: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [M · K, 1, S]: a token sees itself and what stands before it, at most `window` in all."""
        columns = self.cache.columns
        window = window if window is not None and window < columns else None
        if (heads, window, dtype) not in self._masks:
            last_M1 = self.positions_M[:, None]
            column_1S = torch.arange(columns, device=last_M1.device)[None]
            hidden_MS = column_1S > last_M1
            if window is not None:
                hidden_MS |= column_1S <= last_M1 - window
            mask_MS = torch.zeros(hidden_MS.shape, dtype=dtype, device=last_M1.device)
            mask_MS.masked_fill_(hidden_MS, float("-inf"))
            self._masks[heads, window, dtype] = mask_MS.repeat_interleave(heads, dim=0)[:, None]
        return self._masks[heads, window, dtype]
