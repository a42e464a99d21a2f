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
from accord.models.kv_cache import Decode, Prefill, SlotCache
from accord.models.network import Policy
from accord.models.packing import Part, Span, pack_one
from accord.models.trees import Tree

__all__ = ["CachedDecoder", "Decoder", "Prefix", "RecomputingDecoder"]

_ROUND = 8
"""Rows of a step are rounded up to this: oneDNN prepares its kernels anew for every new number of rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A computed prompt that can be forked into slots."""

    prompt_ids: tuple[int, ...]
    hidden_D: Tensor
    """What the model says after its last token."""
    prefill: Prefill | None = None
    span: Span | None = None


class Decoder(Protocol):
    """Computes last hidden states of prompts and of sequences in slots."""

    def start(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        """Compute prompts."""

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
            Prefix(ids, hidden_TD[span.start + span.length - 1], prefill, span)
            for ids, span in zip(prompts, spans, strict=True)
        ]

    def fork(self, prefix: Prefix, slots: slice) -> None:
        assert prefix.prefill is not None
        assert prefix.span is not None
        self._cache.enter(prefix.prefill, prefix.span, slots)

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

    def _hidden(self, ids: Tensor, positions: Tensor, batch: Prefill | Decode) -> Tensor:
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
        return [Prefix(ids, self._last(ids)) for ids in prompts]

    def fork(self, prefix: Prefix, slots: slice) -> None:
        self._slots[slots] = [prefix.prompt_ids] * (slots.stop - slots.start)

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
