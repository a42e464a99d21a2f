"""The key/value cache of a sampler: prompts once, and a slot for the own tokens of every live sequence.

The model is called as always, ``body(input_ids, position_ids, batch=…)``; what `batch` is says what attention does:
a `Prefill` records the keys and values of packed prompts, a `Decode` extends and reads a `SlotCache`. The completions
of one prompt attend to one copy of it, in one product: their queries lie side by side, like the query heads that share
a key head. Nothing is repeated or concatenated but scores. For one query row such products are 17 times faster on a
CPU than a fused scaled-dot-product call, provided that what they read is contiguous (or they copy it first).

All live sequences append at the same column, whatever their lengths: column is time. A slot hides what stands in it
from before its sequence came. Prompts are as many columns as the longest, own tokens as the longest-lived sequence;
keys are stored transposed.

M = slots of a step, H = query heads, K = key/value heads, R = H / K, D = head size, S = columns of own tokens,
G = prompts, N = most completions of one prompt, P = columns of prompts, T = packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from accord.models.native import Native, native
from accord.models.packing import MicroBatch, Span

__all__ = ["Decode", "Extension", "Kept", "Prefill", "SlotCache", "States"]

States = dict[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values of every attention module: [K, T, D] and [K, T, E]."""

_ROUND = 32
"""Columns are added by this many: often enough to read few idle ones, seldom enough to copy little."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """A packed row of prompts whose keys and values ([K, T, D] per attention module) are recorded."""

    row: MicroBatch
    states: States = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A sequence outside of the slots: its prompt stands at `span` of a prefilled row, `own` is what came after it."""

    prefill: Prefill
    span: Span
    own: States = field(default_factory=dict)

    def behind(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Its own keys and values, and these behind them."""
        if module not in self.own:
            return key, value
        own_key, own_value = self.own[module]
        return torch.cat([own_key, key], dim=1), torch.cat([own_value, value], dim=1)

    def prompt(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys and values of its prompt."""
        own = slice(self.span.start, self.span.start + self.span.length)
        key, value = self.prefill.states[module]
        return key[:, own], value[:, own]


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """New tokens behind kept sequences, packed: they see their own sequence and, causally, each other.

    Their keys and values are recorded behind those of their sequence, one dict for each.
    """

    kept: Sequence[Kept]
    lengths: Sequence[int]
    states: Sequence[States]
    masks: dict[object, Tensor] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Layer:
    """Keys and values of one attention module: of prompts [G, K, D, P] and [G, K, P, D], of slots likewise."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class SlotCache:
    """Prompts and slots of every attention module, allocated by the first prompt."""

    def __init__(self, slots: int) -> None:
        self.slots, self.length = slots, 0
        self.layers: dict[nn.Module, _Layer] = {}
        self._columns, self._width = _ROUND, 0
        self._prompts: list[tuple[Prefill, Span]] = []
        self._prompt_of, self._start = [0] * slots, [0] * slots
        self._seating: _Seating | None = None

    def enter(self, kept: Kept, slots: slice) -> None:
        """Let `slots` go on behind a kept sequence."""
        prefill, span = kept.prefill, kept.span
        row = next((g for g, (own, at) in enumerate(self._prompts) if own is prefill and at == span), None)
        if row is None:
            row = len(self._prompts)
            self._prompts.append((prefill, span))
            self._fit_prompts(row)
        count = slots.stop - slots.start
        own = next((key.shape[1] for key, _ in kept.own.values()), 0)
        if own > self.length:
            self._shift(own - self.length)
        columns = slice(self.length - own, self.length)
        for module, (key, value) in kept.own.items():
            self.layers[module].keys[slots, :, :, columns] = key.transpose(1, 2)
            self.layers[module].values[slots, :, columns] = value
        self._prompt_of[slots], self._start[slots] = [row] * count, [columns.start] * count
        self._seating = None

    def keep(self, slot: int) -> Kept:
        """A copy of what stands in a slot."""
        own = slice(self._start[slot], self.length)
        states = {
            module: (layer.keys[slot, :, :, own].transpose(1, 2).clone(), layer.values[slot, :, own].clone())
            for module, layer in self.layers.items()
        }
        return Kept(*self._prompts[self._prompt_of[slot]], states if own.stop > own.start else {})

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        own = slice(self._start[source], self.length)
        for layer in self.layers.values():
            layer.keys[target, :, :, own] = layer.keys[source, :, :, own]
            layer.values[target, :, own] = layer.values[source, :, own]
        self._prompt_of[target], self._start[target] = self._prompt_of[source], self._start[source]
        self._seating = None

    def extend(self, live: int, positions_M: Tensor) -> Decode:
        """Make room for one more token in each of slots 0 … M-1, of which the first `live` hold sequences."""
        if self._seating is None or self._seating.live != live:
            self._drop_prompts(live)
            self._seating = _Seating(self._prompt_of[:live], len(self._prompts), len(positions_M), positions_M.device)
        if self.length == self._columns:
            self._make_room(live)
        idle = len(positions_M) - live
        self._start[live : live + idle] = [self.length] * idle
        self.length += 1
        lengths = [span.length for _, span in self._prompts]
        return Decode(self, self._seating, lengths, self._start[: live + idle], positions_M)

    def _make_room(self, live: int) -> None:
        """Forget the columns before the oldest sequence, then be as long as is needed."""
        oldest = min(self._start[:live])
        kept = slice(oldest, self.length)
        self._start = [max(0, start - oldest) for start in self._start]
        self.length -= oldest
        self._columns = _round(self.length + 1)
        for layer in self.layers.values():
            layer.keys = _resized(layer.keys[..., kept], self.slots, self._columns, dim=3)
            layer.values = _resized(layer.values[:, :, kept], self.slots, self._columns, dim=2)

    def _shift(self, by: int) -> None:
        """Let everything begin so many columns later."""
        self._start = [start + by for start in self._start]
        self._columns = _round(self.length + by + 1)
        for layer in self.layers.values():
            keys, values = layer.keys[..., : self.length], layer.values[:, :, : self.length]
            layer.keys = _resized(keys, self.slots, self._columns, dim=3).roll(by, dims=3)
            layer.values = _resized(values, self.slots, self._columns, dim=2).roll(by, dims=2)
        self.length += by

    def _fit_prompts(self, first: int) -> None:
        """Have rows and columns for all prompts; those from `first` on are new and are written."""
        width = _round(max(span.length for _, span in self._prompts))
        rows = len(self._prompts)
        for module, (key, value) in self._prompts[-1][0].states.items():
            layer = self.layers.get(module) or self._new_layer(key, value)
            self.layers[module] = layer
            if width != self._width or rows > len(layer.prompt_keys):
                before = len(layer.prompt_keys)
                capacity = max(rows, before, min(2 * before, self.slots))
                kept = min(width, self._width)
                layer.prompt_keys = _resized(layer.prompt_keys[..., :kept], capacity, width, dim=3)
                layer.prompt_values = _resized(layer.prompt_values[:, :, :kept], capacity, width, dim=2)
            for row in range(first, rows):
                prefill, span = self._prompts[row]
                key, value = prefill.states[module]
                own = slice(span.start, span.start + span.length)
                layer.prompt_keys[row, :, :, : span.length] = key[:, own].transpose(1, 2)
                layer.prompt_values[row, :, : span.length] = value[:, own]
        self._width = width

    def _new_layer(self, key: Tensor, value: Tensor) -> _Layer:
        (K, _, D), E = key.shape, value.shape[2]
        return _Layer(
            key.new_zeros(1, K, D, self._width),
            value.new_zeros(1, K, self._width, E),
            key.new_zeros(self.slots, K, D, self._columns),
            value.new_zeros(self.slots, K, self._columns, E),
        )

    def _drop_prompts(self, live: int) -> None:
        """Let go of prompts that no live sequence has; the last one fills the gap."""
        used = set(self._prompt_of[:live])
        for row in reversed(range(len(self._prompts))):
            if row not in used:
                last = len(self._prompts) - 1
                for layer in self.layers.values():
                    layer.prompt_keys[row], layer.prompt_values[row] = (
                        layer.prompt_keys[last],
                        layer.prompt_values[last],
                    )
                self._prompts[row] = self._prompts[last]
                self._prompts.pop()
                self._prompt_of = [row if prompt == last else prompt for prompt in self._prompt_of]
        if _round(max(span.length for _, span in self._prompts)) < self._width:
            self._fit_prompts(len(self._prompts))


class _Seating:
    """Which slots have which prompt: [G, N], in the order of slots; shorter rows are filled with any slot."""

    def __init__(self, prompts: Sequence[int], count: int, slots: int, device: torch.device) -> None:
        members: list[list[int]] = [[] for _ in range(count)]
        for slot, prompt in enumerate(prompts):
            members[prompt].append(slot)
        self.live, self.slots = len(prompts), slots
        self.G, self.N = count, max(map(len, members))
        seats = [slot for row in members for slot in (*row, *[row[0]] * (self.N - len(row)))]
        place = {slot: seat for seat, slot in reversed(list(enumerate(seats)))}
        self.prompt_M = torch.tensor([*prompts, *[0] * (slots - len(prompts))], device=device)
        self.order_M = torch.argsort(self.prompt_M, stable=True)
        self._is_plain = seats == list(range(slots))
        self.seat_B = torch.tensor(seats, device=device)
        self._place_M = torch.tensor([place.get(slot, 0) for slot in range(slots)], device=device)

    def together(self, states_MKRC: Tensor) -> Tensor:
        """Rows of slots as rows of prompts: [G · K, N · R, C]."""
        _, K, R, C = states_MKRC.shape
        seated = states_MKRC if self._is_plain else states_MKRC[self.seat_B]
        return seated.view(self.G, self.N, K, R, C).transpose(1, 2).reshape(self.G * K, self.N * R, C)

    def apart(self, states_BXC: Tensor, K: int, R: int) -> Tensor:
        """The inverse: [M, K, R, C]."""
        C = states_BXC.shape[2]
        seated = states_BXC.view(self.G, K, self.N, R, C).transpose(1, 2).reshape(self.G * self.N, K, R, C)
        return seated if self._is_plain else seated[self._place_M]


class Decode:
    """One token of each of slots 0 … M-1, which stands at `positions_M[m]` of its sequence."""

    def __init__(
        self, cache: SlotCache, seating: _Seating, lengths: Sequence[int], starts: Sequence[int], positions_M: Tensor
    ) -> None:
        self._cache, self._seating, self._column = cache, seating, cache.length - 1
        self._positions_M = positions_M
        self._length_G = torch.tensor(lengths, device=positions_M.device)
        self._start_M = torch.tensor(starts, device=positions_M.device)
        # Made once per step, shared by all layers.
        self._masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}

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
        K, E = key.shape[1], value.shape[3]
        native_does = query.device.type == "cpu" and softcap is None and query.shape[3] == E
        kernels = native() if native_does and Native.attends(query.dtype, E) else None
        if kernels is not None:
            states = query[:, :, 0].contiguous(), key[:, :, 0].contiguous(), value[:, :, 0].contiguous()
            return self.attend_natively(kernels, module, states, None, scale, window)[:, None]
        M, H, _, D = query.shape
        R, seating, layer = H // K, self._seating, self._cache.layers[module]
        layer.keys[:M, :, :, self._column] = key[:, :, 0]
        layer.values[:M, :, self._column] = value[:, :, 0]
        query_MKRD = (query * scale).view(M, K, R, D)
        prompt_BDP = layer.prompt_keys[: seating.G].view(seating.G * K, D, -1)
        prompt_BXP = torch.bmm(seating.together(query_MKRD), prompt_BDP)
        own_BRS = torch.bmm(query_MKRD.view(M * K, R, D), layer.keys[:M].view(M * K, D, -1))
        P, S = prompt_BXP.shape[2], own_BRS.shape[2]
        scores_BXC = torch.cat([prompt_BXP, seating.together(own_BRS.view(M, K, R, S))], dim=2)
        if softcap is not None:
            scores_BXC = torch.tanh(scores_BXC / softcap) * softcap
        weights_BXC = torch.softmax(scores_BXC.add_(self._mask(K, R, P, S, window, query.dtype)), dim=-1)
        prompt_BPE = layer.prompt_values[: seating.G].view(seating.G * K, -1, E)
        attended = seating.apart(torch.bmm(weights_BXC[:, :, :P], prompt_BPE), K, R)
        own_BRS = seating.apart(weights_BXC[:, :, P:], K, R).reshape(M * K, R, S)
        attended_BRE = torch.baddbmm(attended.reshape(M * K, R, E), own_BRS, layer.values[:M].view(M * K, S, E))
        return attended_BRE.view(M, 1, H, E)

    def attend_natively(
        self,
        kernels: Native,
        module: nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        rotation: tuple[Tensor, Tensor] | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """The same by compiled code. `states`: contiguous query [M, H, D], key and value [M, K, D]. Returns [M, H, D].

        `rotation`: float32 cos and sin [M, D] of rotary positions that are still to be applied, or None.
        """
        layer, seating = self._cache.layers[module], self._seating
        cache = layer.prompt_keys, layer.prompt_values, layer.keys, layer.values
        seats = seating.order_M, seating.prompt_M, self._length_G, self._start_M, self._positions_M
        return kernels.attend(states, rotation, cache, seats, self._column, scale, window)

    def _mask(self, K: int, R: int, P: int, S: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [G · K, N · R, P + S]: a token sees its prompt and its own tokens, at most `window` in all."""
        seating, device = self._seating, self._positions_M.device
        if (K, R, window, dtype) not in self._masks:
            prompt_1P, own_1S = torch.arange(P, device=device)[None], torch.arange(S, device=device)[None]
            hidden_GNP = (prompt_1P >= self._length_G[:, None])[:, None].expand(-1, seating.N, -1)
            hidden_MS = (own_1S < self._start_M[:, None]) | (own_1S > self._column)
            if window is not None:
                first_M1 = (self._positions_M - window)[:, None]
                hidden_GNP = hidden_GNP | (prompt_1P <= first_M1)[seating.seat_B].view(seating.G, seating.N, P)
                hidden_MS |= own_1S <= self._column - window
            hidden_GNS = hidden_MS[seating.seat_B].view(seating.G, seating.N, S)
            hidden_GNC = torch.cat([hidden_GNP, hidden_GNS], dim=2)
            mask_GNC = torch.zeros(hidden_GNC.shape, dtype=dtype, device=device).masked_fill_(hidden_GNC, float("-inf"))
            spread = mask_GNC[:, None, :, None].expand(-1, K, -1, R, -1)
            self._masks[K, R, window, dtype] = spread.reshape(seating.G * K, seating.N * R, P + S)
        return self._masks[K, R, window, dtype]


def _round(length: int) -> int:
    return -(-length // _ROUND) * _ROUND


def _resized(states: Tensor, rows: int, columns: int, dim: int) -> Tensor:
    """The same numbers in a larger tensor. Zeros elsewhere: a hidden column has weight zero, and 0 · NaN is NaN."""
    shape = list(states.shape)
    shape[0], shape[dim] = rows, columns
    larger = states.new_zeros(shape)
    larger[: len(states)].narrow(dim, 0, states.shape[dim]).copy_(states)
    return larger
