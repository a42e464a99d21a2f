"""What every sampler does, be it in this process or behind HTTP, and the hash by which weights are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from accord.engine.distributed import share
from accord.models.network import Policy, whole
from accord.sampling.request import Request, SamplingConfig
from accord.types import Completion

__all__ = ["Follow", "OnFinish", "Sampler", "by_turns", "hash_weights", "split"]

OnFinish = Callable[[int, Completion], None]
"""Called with the index of a request and its completion as soon as that is finished."""

Follow = Callable[[int, Completion], Future[Request | None]]
"""Called, in any thread, with the index of a request and its completion: is there another request to follow it?

Its prompt begins with prompt and completion of the one before, of which nothing is computed again. It counts as the
same request from then on: it has the index, and its completion takes the place of the one before.
"""


class Sampler(Protocol):
    """Requests in, completions out, in the sampler's own tokens and with its log-probabilities.

    `accord.sampling.local`: in this process. `accord.sampling.remote`: a server of `accord sample-server`.
    `accord.sampling.http`: a server of vLLM.
    """

    @property
    def policy_version(self) -> int:
        """The version of the weights that `load` gave it last; 0 before that."""

    @property
    def weights_hash(self) -> str:
        """`hash_weights` of them."""

    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        """Sample from these weights from now on, under this version.

        Args:
            state: what `policy.state()` returned, where the policy itself does not hold its weights whole.

        Raises:
            StaleWeightsError: the sampler has other weights afterwards.
            SamplerError: its server cannot be reached, or cannot load them.
        """

    def sample(
        self,
        requests: Sequence[Request],
        config: SamplingConfig,
        *,
        on_finish: OnFinish | None = None,
        follow: Follow | None = None,
    ) -> list[Completion]:
        """One completion per request, in the order of the requests.

        Args:
            on_finish: told, in this thread, of every request that is finished and not followed by another.
            follow: makes requests of several turns; `sample` returns, and tells of, the last completion of each.

        Raises:
            ConfigError: a request asks for what does not exist.
            DataError: a prompt is empty, or with `max_new_tokens` longer than the model's context.
            StaleWeightsError: the sampler does not serve the weights that it was given.
            SamplerError: its server cannot be reached, or answers what cannot be used.
        """


def by_turns(
    sample: Callable[[Sequence[Request], OnFinish], object],
    requests: Sequence[Request],
    follow: Follow,
    on_finish: OnFinish | None,
) -> list[Completion]:
    """Requests and those that follow, where a sampler takes all at once: a turn of all of them, then the next.

    Args:
        sample: samples requests, and tells of each completion as it is finished.
    """
    last: dict[int, Completion] = {}
    pending = dict(enumerate(requests))
    while pending:
        indices = list(pending)
        turn: dict[int, tuple[Completion, Future[Request | None]]] = {}

        def ask(place: int, completion: Completion, indices: list[int] = indices, turn: Any = turn) -> None:
            turn[indices[place]] = completion, follow(indices[place], completion)

        sample(list(pending.values()), ask)
        pending = {}
        for index in indices:
            completion, successor = turn[index]
            request = successor.result()
            if request is not None:
                pending[index] = request
                continue
            last[index] = completion
            if on_finish is not None:
                on_finish(index, completion)
    return [last[index] for index in range(len(requests))]


def split(requests: Sequence[Request], config: SamplingConfig, parts: int) -> list[list[int]]:
    """Indices of the requests for each of several samplers: the completions of a prompt together, tokens evenly."""
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault((request.prompt_id, request.prompt_ids), []).append(index)
    sizes = [
        len(prompt_ids) + sum(requests[index].settings(config).max_new_tokens for index in group)
        for (_, prompt_ids), group in groups.items()
    ]
    each = list(groups.values())
    return [[index for group in mine for index in each[group]] for mine in share(sizes, parts)]


_BASES: WeakKeyDictionary[Policy, str] = WeakKeyDictionary()
"""The hash of the weights under an adapter: they are frozen, so it is computed once."""


def hash_weights(policy: Policy, state: Mapping[str, Tensor] | None = None) -> str:
    """A hash of what a sampler needs of a policy: its weights or, with LoRA, those of the adapter and of its base.

    Args:
        state: what `policy.state()` returned, where the policy itself does not hold its weights whole.
    """
    weights = policy.state() if state is None else state
    base = ""
    if policy.adapter is not None:
        if policy not in _BASES:
            frozen = policy.model.state_dict()
            _BASES[policy] = _digest("", {name: whole(t.detach()) for name, t in frozen.items() if "lora_" not in name})
        base = _BASES[policy]
    return _digest(base, weights)


def _digest(base: str, weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(base.encode(), digest_size=16)
    for name in sorted(weights):
        if "value_head" in name.split("."):  # for training only: no sampler has it
            continue
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
