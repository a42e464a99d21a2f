"""The two ways to extend sequences by a token: from a cache, or (models whose attention cannot branch) all over again.

A sequence stands in a slot; live sequences fill slots 0 … M-1. M = live sequences, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from accord.models.decoder_stack import DecoderStack
from accord.models.kv_cache import Decode, Extension, Kept, Prefill, SlotCache
from accord.models.network import Policy
from accord.models.packing import Part, pack_one
from accord.models.trees import Tree

__all__ = ["CachedDecoder", "Decoder", "Prefix", "RecomputingDecoder", "Stem"]

_ROUND = 8
"""Rows of a step are rounded up to this: oneDNN prepares its kernels anew for every new number of rows."""
_PREFILL_ROUND = 32
"""So are those of several tokens of a sequence."""


@dataclass(frozen=True, slots=True, eq=False)
class Stem:
    """Tokens that are computed; with a cache, `kept` is what it holds of them."""

    token_ids: tuple[int, ...]
    kept: Kept | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A stem that can be forked into slots."""

    stem: Stem
    hidden_D: Tensor
    """What the model says after its last token."""


class Decoder(Protocol):
    """Computes last hidden states of prompts and of sequences in slots."""

    def start(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        """Compute prompts."""

    def keep(self, slot: int, token_ids: tuple[int, ...]) -> Stem:
        """A copy of what a slot holds: these tokens."""

    def extend(self, stems: Sequence[tuple[Stem, tuple[int, ...]]]) -> list[Prefix]:
        """Compute new tokens behind each stem; what is computed of the stem is not computed again."""

    def fork(self, prefix: Prefix, slots: slice) -> None:
        """Put a prompt into slots."""

    def move(self, source: int, target: int, length: int) -> None:
        """Let `target` hold what `source` holds: `length` tokens."""

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append a token to each of slots 0 … M-1; returns [M, D]."""


class CachedDecoder:
    """Keeps keys and values: a step computes one token per sequence."""

    def __init__(self, policy: Policy, slots: int, dtype: torch.dtype, stack: DecoderStack | None) -> None:
        self._body, self._device = policy.model.base_model, policy.device
        self._dtype, self._stack = dtype, stack
        self._cache = SlotCache(slots + _idle(slots))

    def start(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        row = pack_one([Part(index, ()) for index in range(len(prompts))], [_tree(ids) for ids in prompts])
        row = row.to(self._device)
        prefill = Prefill(row)
        hidden_TD = self._hidden(row.input_ids_T[None], row.positions_T[None], prefill)[0]
        spans = [tree.prompt for tree in row.layout[: len(prompts)]]
        return [
            Prefix(Stem(ids, Kept(prefill, span)), hidden_TD[span.start + span.length - 1])
            for ids, span in zip(prompts, spans, strict=True)
        ]

    def keep(self, slot: int, token_ids: tuple[int, ...]) -> Stem:
        return Stem(token_ids, self._cache.keep(slot))

    def extend(self, stems: Sequence[tuple[Stem, tuple[int, ...]]]) -> list[Prefix]:
        kept = [stem.kept for stem, _ in stems if stem.kept is not None]
        batch = Extension(kept, [len(new) for _, new in stems], [{} for _ in stems])
        ids_T = [token for _, new in stems for token in new]
        positions_T = [len(stem.token_ids) + place for stem, new in stems for place in range(len(new))]
        idle = [0] * (-len(ids_T) % _PREFILL_ROUND)
        rows_2T = torch.tensor([ids_T + idle, positions_T + idle], device=self._device)
        hidden_TD = self._hidden(rows_2T[:1], rows_2T[1:], batch)[0]
        ends = np.cumsum(batch.lengths).tolist()
        return [
            Prefix(Stem((*stem.token_ids, *new), Kept(own.prefill, own.span, states)), hidden_TD[end - 1])
            for (stem, new), own, states, end in zip(stems, kept, batch.states, ends, strict=True)
        ]

    def fork(self, prefix: Prefix, slots: slice) -> None:
        assert prefix.stem.kept is not None
        self._cache.enter(prefix.stem.kept, slots)

    def move(self, source: int, target: int, length: int) -> None:  # noqa: ARG002
        self._cache.move(source, target)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        M = len(tokens)
        idle = [0] * _idle(M)
        tokens_M1 = torch.tensor([*tokens, *idle], device=self._device)[:, None]
        positions_M = torch.tensor([*positions, *idle], device=self._device)
        batch = self._cache.extend(M, positions_M)
        if self._stack is not None:
            return self._stack.step(tokens_M1[:, 0], batch, positions_M, self._dtype)[:M]
        return self._hidden(tokens_M1, positions_M[:, None], batch)[:M, 0]

    def _hidden(self, ids: Tensor, positions: Tensor, batch: Prefill | Extension | Decode) -> Tensor:
        result: Tensor = self._body(
            input_ids=ids, position_ids=positions, batch=batch, use_cache=False
        ).last_hidden_state
        return result


class RecomputingDecoder:
    """Keeps token ids only: a step computes every sequence from its start, one by one. Slow; right for any model."""

    def __init__(self, policy: Policy, slots: int) -> None:
        self._policy = policy
        self._slots: list[tuple[int, ...]] = [()] * slots

    def start(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        return [Prefix(Stem(ids), self._last(ids)) for ids in prompts]

    def keep(self, slot: int, token_ids: tuple[int, ...]) -> Stem:  # noqa: ARG002
        return Stem(token_ids)

    def extend(self, stems: Sequence[tuple[Stem, tuple[int, ...]]]) -> list[Prefix]:
        return self.start([(*stem.token_ids, *new) for stem, new in stems])

    def fork(self, prefix: Prefix, slots: slice) -> None:
        self._slots[slots] = [prefix.stem.token_ids] * (slots.stop - slots.start)

    def move(self, source: int, target: int, length: int) -> None:
        self._slots[target] = self._slots[source][:length]

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self._slots[slot] = (*self._slots[slot][:position], token)
        return torch.stack([self._last(ids) for ids in self._slots[: len(tokens)]])

    def _last(self, ids: tuple[int, ...]) -> Tensor:
        row = pack_one([Part(0, ())], [_tree(ids)]).to(self._policy.device)
        return self._policy.hidden(row)[len(ids) - 1]


def _idle(rows: int) -> int:
    """Rows that round a step up."""
    return -rows % _ROUND if rows > _ROUND else 0


def _tree(ids: tuple[int, ...]) -> Tree:
    return Tree(np.array(ids, dtype=np.int64), (), ranks=())
