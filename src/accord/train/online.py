"""Training on what the policy samples: every step samples from the network as it now is.

prompts → sampler → completions → rewards → advantages (or pairs, or the best) → trees → updates. What a step sampled is
kept on disk (`accord.train.rollouts`), and so is what passes from step to step: a killed run goes on to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from accord.advantages import KLConfig
from accord.engine.checkpoint import load_checkpoint
from accord.engine.distributed import active, broadcast, rank, world_size
from accord.engine.engine import Engine
from accord.engine.memory import explain_shortage
from accord.errors import ConfigError
from accord.models.fuse import Linear
from accord.models.lora import add_lora
from accord.models.network import Critic, Network, Policy
from accord.models.trees import FloatArray, Tree, with_reference
from accord.rewards import Rewards, reward_metrics
from accord.sampling.local import LocalSampler
from accord.sampling.replica import RankSampler, Replica
from accord.sampling.sampler import Sampler, hash_weights
from accord.train.ahead import Ahead
from accord.train.collect import Collector, Leader
from accord.train.conversations import Conversations
from accord.train.credit import (
    best_trees,
    corrected,
    groups_of,
    kl_metrics,
    pair_trees,
    policy_trees,
    rollout_metrics,
    sampled_by_itself,
    scores_of,
    teacher_metrics,
    trees_of,
    weighted_updates,
    whole_updates,
)
from accord.train.loop import Learner, Loop, Step, Update, save_model
from accord.train.online_config import Method, OnlineConfig, importance_cap_of, learns_afresh, method_of
from accord.train.online_samples import RolloutPage
from accord.train.rollouts import EncodedPrompt, Rollout, Rollouts, RolloutStore
from accord.train.run import Run

__all__ = ["train_online"]

_OF_CRITIC = {"loss": "loss/value_avg", "grad_norm": "critic/grad_norm", "learning_rate": "critic/learning_rate"}


@explain_shortage()
def train_online(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    rewards: Rewards | None,
    config: OnlineConfig,
    run: Run,
    *,
    stage: str,
    reference: Policy | None = None,
    critic: Critic | None = None,
    sampler: Sampler | None = None,
    conversations: Conversations | None = None,
) -> None:
    """Train `policy` in place on what it samples, and write it to the run's directory, its critic beside it.

    Args:
        rewards: of a job of many processes rank 0 scores, and the others need none.
        stage: the name under which progress is shown.
        reference: the policy as it is before training, in a network of its own, where `Method.reads_reference` and all
            weights are trained. With LoRA the policy without its adapters is the reference.
        critic: where the settings name one.
        sampler: what samples, on rank 0 (default: this process, or all processes of the job).
        conversations: where an environment answers the policy, on rank 0.

    Raises:
        ConfigError: a setting does not go with a job of many processes.
        RunError: every reward of a step failed; the message lists the reasons.
        ResourceError: memory runs out.
    """
    method = method_of(config)
    if (critic is None) != (method.value is None):
        raise ValueError("A critic is given exactly where the settings name one.")
    if config.lora:
        add_lora(policy, config.lora, config.seed)
    if method.has_value_head and config.critic and config.critic.value_head:
        policy.load_value_head(Path(config.critic.value_head))
    elif method.has_value_head:
        policy.add_value_head()
    if method.view.kind == "prompts":
        policy.temperature = config.sampling.temperature
    source = _source(policy, config, sampler)
    engine = Engine(policy, config.engine, config.optimizer, beside=12 * _share(critic))
    learners = [Learner(engine, method.loss)]
    if critic is not None and method.value is not None and config.critic is not None:
        valued = Engine(critic, config.engine, config.critic.optimizer, beside=4 * _share(policy))
        learners.append(Learner(valued, method.value, _OF_CRITIC))
    others = [learner.engine for learner in learners[1:]]
    checkpoint = run.latest()
    start = load_checkpoint(engine, checkpoint, others) if checkpoint else 0
    epoch_steps = math.ceil(len(prompts) / config.batch_size)
    steps = range(start, config.steps or epoch_steps)
    with ExitStack() as open_parts:
        leader = None
        if rank() == 0:
            assert source is not None
            assert rewards is not None
            made = _leader(policy, prompts, rewards, config, run, source, steps, conversations)
            leader = open_parts.enter_context(made)
        collector = Collector(policy, leader, source if isinstance(source, RankSampler) and rank() else None)
        feed = _Feed(config, method, learners, collector, _reference_engine(engine, method, reference, config))
        if start:
            feed.restore(start)
        Loop(run, config, learners, start, steps.stop, stage, epoch_steps, collector.settle).go(feed.steps(steps))
    _save(policy, critic, method, run)


def _source(policy: Policy, config: OnlineConfig, sampler: Sampler | None) -> Sampler | None:
    """What samples; None where rank 0 has it. Copies of the policy are made before its weights are sharded."""
    if broadcast(sampler is not None):
        if sampler and config.lora and active():
            hash_weights(policy)  # that of the base is kept: once it is sharded, no rank can compute it alone
        return sampler
    if not active():
        return (Replica if config.rollout.max_staleness else LocalSampler)(policy, config.engine.precision)
    if config.rollout.max_staleness:
        fix = "Leave it out, or let a server sample: --sampler URL (docs/online.md)."
        what = "The processes of a job sample and train in turn."
        raise ConfigError(what, where="rollout.max_staleness", fix=fix)
    return RankSampler(policy, config.engine.precision)


@contextmanager
def _leader(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    rewards: Rewards,
    config: OnlineConfig,
    run: Run,
    sampler: Sampler,
    steps: range,
    conversations: Conversations | None,
) -> Iterator[Leader]:
    """What rank 0 samples, scores and keeps with."""

    def rollouts_in(store: RolloutStore) -> Rollouts:
        given: dict[str, Any] = {"completions": config.rollout.completions, "seed": config.seed}
        return Rollouts(prompts, sampler, rewards, store, config.sampling, conversations=conversations, **given)

    page = RolloutPage(run.directory, policy.tokenizer, config.samples)
    with closing(RolloutStore(run.directory)) as store:
        rollouts = rollouts_in(store)
        if not config.rollout.max_staleness:
            yield Leader(policy, config, rollouts, page, None)
            return
        with closing(Ahead(policy, sampler, rollouts_in, run.directory, config, steps)) as ahead:
            yield Leader(policy, config, rollouts, page, ahead)


def _save(policy: Policy, critic: Critic | None, method: Method, run: Run) -> None:
    if method.has_value_head:
        state = policy.state()
        if rank() == 0:
            policy.save_value_head(run.directory / "critic.safetensors", state)
    if critic is not None:
        critic.model.eval()
        state = critic.state()
        if rank() == 0:
            critic.save(run.directory / "critic", state)
    save_model(policy, run)


def _share(network: Network | None) -> int:
    """Trained weights that one process has."""
    return sum(parameter.numel() for parameter in network.trainable()) // world_size() if network else 0


class _Feed:
    """Makes the steps of a run, one when the one before it is learned."""

    def __init__(
        self,
        config: OnlineConfig,
        method: Method,
        learners: Sequence[Learner],
        collector: Collector,
        reference: Engine | None,
    ) -> None:
        self.config, self.method, self.collector, self.reference = config, method, collector, reference
        self.engine = learners[0].engine
        self.valued = learners[-1].engine  # of a critic of its own, or the policy with a value head

    def steps(self, steps: range) -> Generator[Step, None, None]:
        """Every step's completions are of the weights that the step before it has left, or are sampled ahead."""
        advantage = self.method.advantage
        for step in steps:
            made = self._step(step)
            self.collector.keep(step + 1, advantage.state() if advantage else {})
            yield made

    def restore(self, step: int) -> None:
        """Go on behind so many steps."""
        state = self.collector.restore(step)
        if self.method.advantage:
            self.method.advantage.restore(state)

    def _step(self, step: int) -> Step:
        found = self.collector.collect(step)
        rewards = [reward for rollout in found.everything for reward in rollout.rewards]
        metrics = rollout_metrics(found.everything, step, scored=self.method.reads_scores) | reward_metrics(rewards)
        if self.config.rollout.dynamic_sampling:
            metrics["dynamic_sampling/prompts"] = len(found.everything)
        if found.speed:
            metrics["sampling/tokens_per_second"] = found.speed
        began = time.perf_counter()
        updates = self._updates(step, found.kept, metrics)
        seconds = {**found.seconds, "forward": time.perf_counter() - began}
        if not updates:
            print(f"Step {step + 1}: no completion of a prompt is better than another; nothing is learned from them.")
        limit = self.config.rollout.kl_stop
        enough = None if limit is None else lambda learned: learned["policy/approxkl_avg"] > limit
        return Step(updates, metrics, seconds, enough)

    def _updates(self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, float]) -> list[Update]:
        """What the loss reads of these completions; adds to the metrics what is found on the way."""
        settings, seeds = self.config.rollout, (self.config.seed, step)
        trees = trees_of(rollouts)
        scores = [scores_of(rollout, settings, self.config.sampling.max_new_tokens) for rollout in rollouts]
        if self.method.advantage is None:
            is_pairs = self.method.view.kind == "preferences"
            chosen = pair_trees(trees, scores) if is_pairs else best_trees(trees, scores, settings.min_reward)
            return whole_updates(self._with_reference(chosen), settings, seeds)
        if not trees:
            return []
        advantage, longest = self.method.advantage, self.config.sampling.max_new_tokens
        cap = importance_cap_of(self.config)
        if cap:
            trees, seen = corrected(trees, self.engine.forward(trees), cap)
            metrics |= seen
        trees = self._with_reference(trees)
        groups = groups_of(trees, scores, self._values(trees))
        if self.method.teacher:
            metrics |= teacher_metrics(groups)
        elif advantage.needs_reference:
            target = advantage.config.kl_target if isinstance(advantage.config, KLConfig) else None
            metrics |= kl_metrics(groups, advantage.memory.kl_coefficient, target)
        earning, idle = policy_trees(trees, groups, advantage, settings, longest)
        if learns_afresh(self.config):
            earning = [sampled_by_itself(tree) for tree in earning]
        if not self.method.may_skip:
            idle = [False] * len(earning)
        return weighted_updates(earning, idle, settings, longest, seeds)

    def _with_reference(self, trees: list[Tree]) -> list[Tree]:
        if self.reference is None or not trees:
            return trees
        with self.reference.network.without_adapter():
            said = self.reference.forward(trees)
        return [with_reference(tree, values) for tree, values in zip(trees, said, strict=True)]

    def _values(self, trees: Sequence[Tree]) -> list[list[FloatArray]] | None:
        advantage = self.method.advantage
        if advantage is None or not advantage.advantage.needs_values:
            return None
        said = self.valued.forward_statistics(trees, frozenset({"values"}))
        return [[named["values"] for named in of_tree] for of_tree in said]


def _reference_engine(engine: Engine, method: Method, reference: Policy | None, config: OnlineConfig) -> Engine | None:
    """What says the reference's log-probabilities: the policy itself with its adapters off, or a frozen copy."""
    if not method.reads_reference:
        return None
    if reference is None and engine.network.adapter is not None:
        return engine
    if reference is None:
        raise ValueError("All weights are trained, so the reference must be a network of its own.")
    reference.model.requires_grad_(False)
    if method.view.kind == "prompts":
        reference.temperature = config.sampling.temperature
    if engine.dtype != torch.float32 and not active():  # sharded weights travel in that precision anyway
        # Autocast would cast them in every pass; the numbers are the same, in half the memory.
        for module in reference.model.base_model.modules():
            if type(module) is Linear:
                module.to(engine.dtype)
    return Engine(reference, config.engine)
