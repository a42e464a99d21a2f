"""What every sampler does, be it in this process or behind HTTP, and the hash by which weights are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from accord.engine.distributed import share
from accord.models.network import Policy, whole
from accord.sampling.request import Request, SamplingConfig
from accord.types import Completion

__all__ = ["OnFinish", "Sampler", "hash_weights", "split"]

OnFinish = Callable[[int, Completion], None]
"""Called with the index of a request and its completion as soon as that is finished."""


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
        self, requests: Sequence[Request], config: SamplingConfig, *, on_finish: OnFinish | None = None
    ) -> list[Completion]:
        """One completion per request, in the order of the requests.

        Raises:
            ConfigError: a request asks for what does not exist.
            DataError: a prompt is empty, or with `max_new_tokens` longer than the model's context.
            StaleWeightsError: the sampler does not serve the weights that it was given.
            SamplerError: its server cannot be reached, or answers what cannot be used.
        """


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
