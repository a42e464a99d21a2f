"""What an online run will cost in memory, before it is started: sampling, learning, and the networks beside the policy.

A step samples and learns in turn, so its peak is the larger of the two; the reference, a critic with its optimiser and
reward models are there all the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import torch

from accord.engine.engine import Engine
from accord.engine.memory import SMALLEST, Load, Memory, MemoryModel, usable_memory
from accord.engine.precision import resolve_precision
from accord.models.fuse import Linear
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Critic, Policy
from accord.models.packing import pack
from accord.models.trees import Branch, Tree
from accord.sampling.local import LocalSampler
from accord.train.online_config import OnlineConfig, method_of
from accord.train.plan import Advice
from accord.train.rollouts import EncodedPrompt

__all__ = ["OnlineData", "OnlinePlan", "memory_in_use", "plan_online"]

_FEW = 8
"""Completions at a time, as advice."""


@dataclass(frozen=True, slots=True)
class OnlineData:
    """What a step takes at most: its prompts are the longest, and all completions as long as they may be.

    Attributes:
        steps: of the whole run.
        lengths: tokens of a prompt: median, 90 % quantile, longest.
        tokens: unique tokens that a step learns from.
        micro_batches: in which it does so.
    """

    steps: int
    lengths: tuple[int, int, int]
    tokens: int
    micro_batches: int


@dataclass(frozen=True, slots=True)
class OnlinePlan:
    """What a run takes of memory.

    Attributes:
        tokens: unique tokens per micro-batch.
        checkpointing: whether activations are computed again.
        learning: of the policy, at the peak of an update.
        sampling: of the policy while this process samples; None where other processes do.
        critic: bytes of everything at the peak of an update of a critic of its own; 0 without one.
        beside: bytes of what stands beside the policy all the time, by name.
        capacity: bytes that may be used.
        advice: what makes it smaller, where it does not fit.
    """

    data: OnlineData
    tokens: int
    checkpointing: bool
    learning: Memory
    sampling: Memory | None
    critic: int
    beside: Mapping[str, int]
    capacity: int
    advice: Sequence[Advice] = field(default=())

    @property
    def needed(self) -> int:
        """Bytes at the peak of a step."""
        beside = sum(self.beside.values())
        sampling = self.sampling.total if self.sampling else 0
        return max(self.learning.total + beside, sampling + beside, self.critic)

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process has of the device's memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def plan_online(
    policy: Policy,
    critic: Critic | None,
    prompts: Sequence[EncodedPrompt],
    config: OnlineConfig,
    *,
    program: int,
    rewards: int,
    teacher: Policy | None = None,
) -> OnlinePlan:
    """Predict what training `policy` costs; it is changed.

    Args:
        critic: of its own, where the settings name one.
        program: bytes in use before a network was loaded.
        rewards: bytes that they take.
        teacher: the reference, where the settings name one.
    """
    if config.lora:
        add_lora(policy, config.lora, config.seed)
    dtype = resolve_precision(config.engine.precision, policy.device)
    models = [replace(MemoryModel.of(each, dtype), program=program) for each in (policy, critic) if each]
    beside = _beside(policy, critic, teacher, config, dtype) | ({"rewards": rewards} if rewards else {})
    loaded = rewards + (models[-1].weights if critic else 0) + (beside["reference"] if teacher else 0)
    engine = Engine(policy, config.engine, config.optimizer, beside=sum(beside.values()) - loaded)
    made = _plan(policy, models, beside, prompts, config, engine.tokens, engine.checkpointing)
    return made if made.fits else replace(made, advice=_advice(policy, models, made, prompts, config))


def _plan(
    policy: Policy,
    models: Sequence[MemoryModel],
    beside: Mapping[str, int],
    prompts: Sequence[EncodedPrompt],
    config: OnlineConfig,
    tokens: int,
    checkpointing: bool,
) -> OnlinePlan:
    """With these settings of the engine; `models` are of the policy and of the critic, if there is one."""
    model, *others = models
    trees = _trees(prompts, config)
    loads = [Load.of(part, policy) for part in pack(trees, tokens, branching=policy.branching)]
    largest = max(loads, key=lambda load: (load.tokens, load.loss_tokens, load.cells))
    peaks = [each.training(largest, checkpointing=checkpointing, accumulates=len(loads) > 1) for each in models]
    critic = 0
    if others:
        others_of_critic = sum(size for name, size in beside.items() if name != "critic")
        critic = peaks[1].total + model.weights + model.gradients + 8 * model.trainable + others_of_critic
    median, most, longest = np.quantile([len(each.ids_P) for each in prompts], (0.5, 0.9, 1.0)).astype(int).tolist()
    return OnlinePlan(
        data=OnlineData(
            steps=config.steps or math.ceil(len(prompts) / config.batch_size),
            lengths=(median, most, longest),
            tokens=sum(len(tree) for tree in trees),
            micro_batches=len(loads),
        ),
        tokens=tokens,
        checkpointing=checkpointing,
        learning=peaks[0],
        sampling=None if config.samples_elsewhere else model.sampling(_workspace(policy, config, longest)),
        critic=critic,
        beside=beside,
        capacity=usable_memory(policy.device),
    )


def _beside(
    policy: Policy, critic: Critic | None, teacher: Policy | None, config: OnlineConfig, dtype: torch.dtype
) -> dict[str, int]:
    """What stands beside the policy all the time, without the rewards."""
    beside = {}
    if teacher or (method_of(config).reads_reference and not config.lora):
        model = (teacher or policy).model
        linears = [module.weight for module in model.base_model.modules() if type(module) is Linear]
        low = sum(weight.numel() * (4 - dtype.itemsize) for weight in linears)
        beside["reference"] = sum(tensor.nbytes for tensor in model.parameters()) - low
    if critic:
        beside["critic"] = 16 * sum(parameter.numel() for parameter in critic.trainable())
    if config.rollout.max_staleness and not config.samples_elsewhere:
        weights = sum(tensor.nbytes for tensor in policy.model.parameters())
        beside["ahead"] = weights + sum(parameter.nbytes for parameter in policy.trainable())
    return beside


def _trees(prompts: Sequence[EncodedPrompt], config: OnlineConfig) -> list[Tree]:
    """The longest prompts of which a step can be made, with the completions that it learns from at their longest."""
    count = {"preferences": 2, "demonstrations": 1}.get(method_of(config).view.kind, config.rollout.completions)
    length = config.sampling.max_new_tokens
    branch = Branch(np.zeros(length, np.int64), np.ones(length, bool))
    longest = sorted((each.ids_P for each in prompts), key=len, reverse=True)[: config.batch_size]
    return [Tree(ids_P, (branch,) * count, ranks=(0,) * count) for ids_P in longest]


def _workspace(policy: Policy, config: OnlineConfig, longest: int) -> int:
    """Bytes of keys, values and logits while it samples; every prompt's stand in the row that computed it as well."""
    sampler, sampling = LocalSampler(policy, config.engine.precision), config.sampling
    slots = min(sampling.max_batch, config.batch_size * config.rollout.completions)
    prompts = min(config.batch_size, math.ceil(slots / config.rollout.completions) + 1)
    kept = sampler.kept_per_token() * (2 * prompts * longest + slots * sampling.max_new_tokens)
    return kept + slots * len(policy.head.weight_VD) * (8 + sampler.dtype.itemsize)


def _advice(
    policy: Policy,
    models: Sequence[MemoryModel],
    made: OnlinePlan,
    prompts: Sequence[EncodedPrompt],
    config: OnlineConfig,
) -> list[Advice]:
    """Changes that lower the peak, each alone, then all of them."""
    again, can = "--set engine.activation_checkpointing=on", policy.model.supports_gradient_checkpointing
    fewer, few = f"--set engine.micro_batch_tokens={SMALLEST}", f"--set sampling.max_batch={_FEW}"
    small = config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_batch": _FEW})})
    found: list[Advice] = []

    def add(what: str, words: str, settings: OnlineConfig, tokens: int, checkpointing: bool) -> None:
        needed = _plan(policy, models, beside, prompts, settings, tokens, checkpointing).needed
        if needed < made.needed:
            found.append(Advice(what, words, needed))

    beside = made.beside
    if not made.checkpointing and can:
        add("compute activations again (8 to 18 % slower)", again, config, made.tokens, True)
    if made.tokens > SMALLEST:
        add("smaller micro-batches", fewer, config, SMALLEST, made.checkpointing)
    if made.sampling and config.sampling.max_batch > _FEW:
        add("sample fewer completions at a time", few, small, made.tokens, made.checkpointing)
    add("all of these", f"{again} {fewer} {few}", small, SMALLEST, made.checkpointing or can)
    if config.lora is None:
        add_lora(policy, LoRAConfig())
        dtype, adapters = models[0].precision, config.model_copy(update={"lora": LoRAConfig()})
        models = [replace(MemoryModel.of(policy, dtype), program=models[0].program), *models[1:]]
        if method_of(config).teacher is None:
            beside = {name: size for name, size in beside.items() if name != "reference"}
        add("train LoRA adapters", "--lora", adapters, made.tokens, made.checkpointing)
        small = small.model_copy(update={"lora": LoRAConfig()})
        add("LoRA and the above", f"--lora {again} {fewer} {few}", small, SMALLEST, made.checkpointing or can)
    return found
