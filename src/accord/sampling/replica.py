"""Sampling from copies of the policy: while its weights change, and on every process that shares it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from accord.engine.distributed import active, call_all, compute_device, gather, rank, world_size
from accord.engine.precision import Precision
from accord.errors import AccordError, StaleWeightsError
from accord.models.network import Policy
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.sampler import Follow, OnFinish, by_turns, split
from accord.types import Completion

__all__ = ["RankSampler", "Replica"]


class Replica(LocalSampler):
    """Samples from a whole copy of the policy, to which `load` brings the weights.

    Make it before an engine shards them. Weights that are not trained are shared, so with LoRA it costs an adapter.
    """

    def __init__(self, policy: Policy, precision: Precision = "auto") -> None:
        shared = {id(parameter): parameter for parameter in policy.model.parameters() if not parameter.requires_grad}
        frozen = copy.deepcopy(policy, shared)
        frozen.model.requires_grad_(False)
        if active():
            frozen.model.to(compute_device())
        super().__init__(frozen, precision)

    @torch.no_grad()
    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        """Sample from a copy of these weights from now on, under this version; see `Sampler.load`."""
        weights = policy.state() if state is None else state
        mine = self.policy
        missing, unexpected = (mine.adapter or mine.model).load_state_dict(weights, strict=False)
        if unexpected or (missing and mine.adapter is None):
            what = f"These weights are those of another model: {[*unexpected, *missing][0]} is not in both."
            raise StaleWeightsError(what, fix="Train with the model that the sampler was made from.")
        self.policy_version = version


class RankSampler:
    """Every process of a job samples a share of the prompts from a replica of its own; rank 0 has all completions.

    Rank 0 calls `sample` inside `accord.engine.distributed.lead`, whose other ranks `help`. What is sampled together
    decides the last bits of log-probabilities, so they differ with the number of processes; tokens do not.

    Attributes:
        policy_version: what `load` said last.
    """

    def __init__(self, policy: Policy, precision: Precision = "auto") -> None:
        self._replica = Replica(policy, precision)
        self.policy_version = 0

    @property
    def weights_hash(self) -> str:
        """The hash of the replica's weights, computed anew."""
        return self._replica.weights_hash

    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        """Sample from these weights from now on; every rank calls it. See `Sampler.load`."""
        self._replica.load(version, policy, state)
        self.policy_version = version

    def sample(
        self,
        requests: Sequence[Request],
        config: SamplingConfig,
        *,
        on_finish: OnFinish | None = None,
        follow: Follow | None = None,
    ) -> list[Completion]:
        """One completion per request, in the order of the requests; see `Sampler.sample`. Rank 0 calls it.

        Turn by turn: all requests that follow are divided among the processes anew, and computed as wholes.
        """
        if follow is None:
            return self._sample(requests, config, on_finish)
        return by_turns(lambda turn, tell: self._sample(turn, config, tell), requests, follow, on_finish)

    def _sample(
        self, requests: Sequence[Request], config: SamplingConfig, on_finish: OnFinish | None
    ) -> list[Completion]:
        call_all((list(requests), config))
        finished: dict[int, Completion] = {}
        for outcome in self._outcomes(requests, config):
            if isinstance(outcome, AccordError):
                raise outcome
            finished |= outcome
        for index in range(len(requests)) if on_finish else ():
            assert on_finish is not None
            on_finish(index, finished[index])
        return [finished[index] for index in range(len(requests))]

    def help(self, call: tuple[list[Request], SamplingConfig]) -> None:
        """The part of the other ranks in what rank 0 samples."""
        self._outcomes(*call)

    def _outcomes(
        self, requests: Sequence[Request], config: SamplingConfig
    ) -> list[dict[int, Completion] | AccordError]:
        """What every rank has sampled, by index of the request, or why it could not."""
        outcome: dict[int, Completion] | AccordError
        try:
            mine = split(requests, config, world_size())[rank()]
            sampled = self._replica.sample([requests[index] for index in mine], config)
            outcome = dict(zip(mine, sampled, strict=True))
        except AccordError as error:
            outcome = error
        return gather(outcome)
