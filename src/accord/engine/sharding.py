"""Sharding over the processes of a job: FSDP2 (`fully_shard`), one group per transformer block and one for the rest.

Each rank keeps 1/world of every weight, gradient and moment. Weights are gathered block by block where they are read;
gradients are summed over ranks, never averaged: losses are divided by the global denominator already.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from accord.config import Config
from accord.engine.distributed import gather, rank, world_size
from accord.engine.views import Said, merge
from accord.errors import ConfigError
from accord.models.network import Network, Outputs
from accord.models.packing import MicroBatch, pack
from accord.models.trees import Branch, Tree

__all__ = ["ShardedNetwork", "ShardingConfig", "everywhere"]


class ShardingConfig(Config):
    """How a model is spread over processes."""

    strategy: Literal["full", "grad"] = "full"
    """`full` gathers a block's weights anew for its backward pass (ZeRO-3); `grad` keeps them whole from forward to
    backward (ZeRO-2): more memory, less traffic."""
    cpu_offload: bool = False
    """Keep weights, gradients and moments in the memory of the host, and step there."""


class ShardedNetwork:
    """A network whose weights are sharded; it is called like the network, on every rank equally often.

    Attributes:
        idle: a micro-batch of no tree, for a rank that has fewer than others: it takes part and changes no number.
    """

    def __init__(self, network: Network, config: ShardingConfig, device: torch.device, dtype: torch.dtype) -> None:
        if config.cpu_offload and device.type == "cpu":
            fix = "Leave it out."
            raise ConfigError(
                "Everything is in the host's memory already.", where="engine.sharding.cpu_offload", fix=fix
            )
        mesh = init_device_mesh(device.type, (world_size(),))
        offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
        # A block's products are all that autocast would round to this precision, so its weights travel rounded; what
        # is read in float32 (embeddings, the last norm, a score head) is in the group of the root.
        low = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        self._root = _Root(network)
        for layer in network.layers():
            keep = config.strategy == "grad"
            fully_shard(layer, mesh=mesh, reshard_after_forward=not keep, mp_policy=low, offload_policy=offload)
        fully_shard(self._root, mesh=mesh, offload_policy=offload)
        for module in self._shards():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        one = np.zeros(1, np.int64)
        self._dummy = pack([Tree(one, (Branch(one, np.ones(1, bool)),))], 1)[0].to(device)
        self.idle = replace(self._dummy, parts=(), branch_N=self._dummy.branch_N[:0])

    def __call__(self, batch: MicroBatch, statistics: frozenset[str]) -> Outputs:
        idle = batch is self.idle
        tensors: dict[str, Tensor] = self._root(self._dummy if idle else batch, statistics)
        named = {name: values[:0] if idle else values for name, values in tensors.items()}
        return Outputs.of(named)

    def reshard(self) -> None:
        """Let go of the whole weights that a pass without a backward pass leaves behind."""
        for module in self._shards():
            module.reshard()

    def _shards(self) -> list[FSDPModule]:
        return [module for module in self._root.modules() if isinstance(module, FSDPModule)]


class _Root(nn.Module):
    """A network as one module: FSDP has the weights of its group whole while this runs, so also where the head, which
    is read and not called, is read."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model, self.network = network.model, network

    def forward(self, batch: MicroBatch, statistics: frozenset[str]) -> dict[str, Tensor]:
        # FSDP hangs its hooks on what is returned, and a view could lose them.
        return {name: values.clone() for name, values in self.network(batch, statistics).tensors().items()}


def everywhere(said: Said) -> Said:
    """What the network said on all ranks, in their order. Gradients flow to this rank's own part only."""
    device = said.branch_N.device
    plain = {name: values.detach().cpu() for name, values in said.outputs.tensors().items()}
    parts = [
        Said(owner_C, branch_N.to(device), Outputs.of({name: values.to(device) for name, values in tensors.items()}))
        for owner_C, branch_N, tensors in gather((said.owner_C, said.branch_N.cpu(), plain))
    ]
    parts[rank()] = said
    return merge(parts)
