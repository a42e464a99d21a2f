"""Training on what the policy samples: every step samples from the network as it now is.

prompts → sampler → completions → rewards → advantages (or pairs, or the best) → trees → updates. What a step sampled is
kept on disk (`accord.train.rollouts`), and so is what passes from step to step: a killed run goes on to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import nn

from accord.engine.checkpoint import load_checkpoint
from accord.engine.distributed import active
from accord.engine.engine import Engine
from accord.engine.memory import explain_shortage
from accord.errors import ConfigError, RunError
from accord.models.lora import add_lora
from accord.models.network import Critic, Policy
from accord.models.trees import FloatArray, Tree, with_reference
from accord.rewards import Rewards, failure_summary, reward_metrics
from accord.sampling.local import LocalSampler
from accord.sampling.sampler import Sampler
from accord.train.ahead import Ahead
from accord.train.credit import (
    Doubles,
    best_trees,
    corrected,
    differs,
    groups_of,
    kl_metrics,
    pair_trees,
    policy_trees,
    rollout_metrics,
    scores_of,
    trees_of,
    weighted_updates,
    whole_updates,
)
from accord.train.loop import Learner, Loop, Step, Update, save_model
from accord.train.online_config import Method, OnlineConfig, importance_cap_of, method_of
from accord.train.online_samples import RolloutPage
from accord.train.rollouts import EncodedPrompt, Rollout, Rollouts, RolloutStore
from accord.train.run import Run

__all__ = ["train_online"]

_OF_CRITIC = {"loss": "loss/value_avg", "grad_norm": "critic/grad_norm", "learning_rate": "critic/learning_rate"}


@explain_shortage()
def train_online(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    rewards: Rewards,
    config: OnlineConfig,
    run: Run,
    *,
    stage: str,
    reference: Policy | None = None,
    critic: Critic | None = None,
    sampler: Sampler | None = None,
) -> None:
    """Train `policy` in place on what it samples, and write it to the run's directory, its critic beside it.

    Args:
        stage: the name under which progress is shown.
        reference: the policy as it is before training, in a network of its own, where `Method.reads_reference` and all
            weights are trained. With LoRA the policy without its adapters is the reference.
        critic: where the settings name one.
        sampler: what samples (default: this process).

    Raises:
        RunError: every reward of a step failed; the message lists the reasons.
        ResourceError: memory runs out.
    """
    method = method_of(config)
    if active():
        fix = "Leave out --processes; --sampler lets a server sample."
        raise ConfigError("Online training is of one process so far.", where="--processes", fix=fix)
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
    engine = Engine(policy, config.engine, config.optimizer)
    learners = [Learner(engine, method.loss)]
    if critic is not None and method.value is not None and config.critic is not None:
        learners.append(Learner(Engine(critic, config.engine, config.critic.optimizer), method.value, _OF_CRITIC))
    others = [learner.engine for learner in learners[1:]]
    checkpoint = run.latest()
    start = load_checkpoint(engine, checkpoint, others) if checkpoint else 0
    total = config.steps or math.ceil(len(prompts) / config.batch_size)
    source = sampler or LocalSampler(policy, config.engine.precision)

    def rollouts_in(store: RolloutStore) -> Rollouts:
        count, seed = config.rollout.completions, config.seed
        return Rollouts(prompts, source, rewards, store, config.sampling, completions=count, seed=seed)

    with closing(RolloutStore(run.directory)) as store, ExitStack() as threads:
        feed = _Feed(config, method, learners, rollouts_in(store), _reference_engine(engine, method, reference, config))
        if config.rollout.max_staleness:
            feed.ahead = Ahead(policy, source, rollouts_in, run.directory, config, range(start, total))
            threads.enter_context(closing(feed.ahead))
        feed.page = RolloutPage(run.directory, policy.tokenizer, config.samples)
        if start:
            feed.restore(store.state(start))
        epoch_steps = math.ceil(len(prompts) / config.batch_size)
        loop = Loop(run, config, learners, start, total, stage, epoch_steps, feed.ahead.settle if feed.ahead else None)
        loop.go(feed.steps(range(start, total)))
    if method.has_value_head:
        policy.save_value_head(run.directory / "critic.safetensors")
    if critic is not None:
        critic.model.eval()
        critic.save(run.directory / "critic")
    save_model(policy, run)


class _Feed:
    """Makes the steps of a run, one when the one before it is learned."""

    def __init__(
        self,
        config: OnlineConfig,
        method: Method,
        learners: Sequence[Learner],
        rollouts: Rollouts,
        reference: Engine | None,
    ) -> None:
        self.config, self.method, self.rollouts, self.reference = config, method, rollouts, reference
        self.engine = learners[0].engine
        self.valued = learners[-1].engine  # of a critic of its own, or the policy with a value head
        self.page: RolloutPage | None = None
        self.ahead: Ahead | None = None
        self.warned = False

    def steps(self, steps: range) -> Generator[Step, None, None]:
        """Every step's completions are of the weights that the step before it has left, or are sampled ahead."""
        policy = self.engine.network
        assert isinstance(policy, Policy)
        for step in steps:
            if self.ahead:
                self.ahead.give(step)
            else:
                self.rollouts.sampler.load(step, policy)
            made = self._step(step)
            self.rollouts.store.keep_state(step + 1, self.state())
            yield made

    def state(self) -> dict[str, object]:
        """What the next step begins with."""
        advantage = self.method.advantage
        return {
            "position": self.rollouts.position,
            "rewards": self.rollouts.rewards.state(),
            "advantage": advantage.state() if advantage else {},
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Take up what `state` has returned."""
        position, rewards, advantage = state["position"], state["rewards"], state["advantage"]
        assert isinstance(position, int)
        assert isinstance(rewards, Mapping)
        assert isinstance(advantage, Mapping)
        self.rollouts.position = position
        self.rollouts.rewards.restore(rewards)
        if self.method.advantage:
            self.method.advantage.restore(advantage)

    def _step(self, step: int) -> Step:
        everything, kept = self._collect(step)
        rewards = [reward for rollout in everything for reward in rollout.rewards]
        metrics = {**rollout_metrics(everything, step), **reward_metrics(rewards)}
        if self.config.rollout.dynamic_sampling:
            metrics["dynamic_sampling/prompts"] = len(everything)
        speed = self.ahead.speed if self.ahead else self.rollouts.tokens / self.rollouts.seconds["sampling"]
        if speed:
            metrics["sampling/tokens_per_second"] = speed
        if self.page:
            self.page.show(step + 1, everything)
        began = time.perf_counter()
        updates = self._updates(step, kept, metrics)
        seconds = {**self.rollouts.seconds, "forward": time.perf_counter() - began}
        if not updates:
            print(f"Step {step + 1}: no completion of a prompt is better than another; nothing is learned from them.")
        limit = self.config.rollout.kl_stop
        enough = None if limit is None else lambda learned: learned["policy/approxkl_avg"] > limit
        return Step(updates, metrics, seconds, enough)

    def _collect(self, step: int) -> tuple[list[Rollout], list[Rollout]]:
        """All that was sampled for a step, and what of it is trained on."""
        wanted, again = self.config.batch_size, self.config.rollout.dynamic_sampling
        self.rollouts.begin(step)
        if self.ahead:
            self.rollouts.seconds["sampling"] += self.ahead.wait(step)
        everything = self._checked(self.rollouts.collect(wanted))
        if not again:
            return everything, everything
        kept = [rollout for rollout in everything if differs(self._scores(rollout))]
        for _ in range(again):
            if len(kept) == wanted:
                break
            more = self._checked(self.rollouts.collect(wanted - len(kept)))
            everything = everything + more
            kept += [rollout for rollout in more if differs(self._scores(rollout))]
        return everything, kept

    def _checked(self, found: list[Rollout]) -> list[Rollout]:
        """Say once that rewards fail, and stop where none is left."""
        rewards = [reward for rollout in found for reward in rollout.rewards]
        reasons = failure_summary(rewards)
        if all(reward.value is None for reward in rewards):
            fix = "Mend that, then run the same command with --resume."
            raise RunError(f"Every reward failed. {reasons}", where=f"step {self.rollouts.step + 1}", fix=fix)
        if reasons and not self.warned:
            self.warned = True
            print(f"Step {self.rollouts.step + 1}: {reasons}. metrics.jsonl counts what fails from here on.")
        return found

    def _scores(self, rollout: Rollout) -> Doubles:
        return scores_of(rollout, self.config.rollout, self.config.sampling.max_new_tokens)

    def _updates(self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, float]) -> list[Update]:
        """What the loss reads of these completions; adds to the metrics what is found on the way."""
        settings, seeds = self.config.rollout, (self.config.seed, step)
        trees, scores = trees_of(rollouts), [self._scores(rollout) for rollout in rollouts]
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
        if advantage.needs_reference:
            metrics |= kl_metrics(groups, advantage.memory.kl_coefficient)
        earning, idle = policy_trees(trees, groups, advantage, settings, longest)
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
    if engine.network.adapter is not None:
        return engine
    if reference is None:
        raise ValueError("All weights are trained, so the reference must be a network of its own.")
    reference.model.requires_grad_(False)
    if method.view.kind == "prompts":
        reference.temperature = config.sampling.temperature
    if engine.dtype != torch.float32:
        # Autocast would cast them in every pass; the numbers are the same, in half the memory.
        for module in reference.model.base_model.modules():
            if type(module) is nn.Linear:
                module.to(engine.dtype)
    return Engine(reference, config.engine)
