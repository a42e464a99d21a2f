"""What a step trains on: prompts are sampled and scored once, on rank 0, and told to the other processes of the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from accord.engine.distributed import active, lead
from accord.errors import RunError
from accord.models.network import Policy
from accord.rewards import failure_summary
from accord.sampling.replica import RankSampler
from accord.train.ahead import Ahead
from accord.train.credit import Doubles, differs, scores_of
from accord.train.online_config import OnlineConfig
from accord.train.online_samples import RolloutPage
from accord.train.rollouts import Rollout, Rollouts

__all__ = ["Collected", "Collector", "Leader"]


@dataclass(frozen=True, slots=True)
class Collected:
    """A step's completions with their rewards.

    Attributes:
        everything: all that was sampled for the step.
        kept: what of it is trained on.
        seconds: what sampling and rewards have taken.
        speed: tokens per second of sampling; 0 if nothing was sampled.
    """

    everything: Sequence[Rollout]
    kept: Sequence[Rollout]
    seconds: Mapping[str, float]
    speed: float


class Collector:
    """Collects step by step, the same on every rank.

    Args:
        leader: on rank 0: what samples, scores and keeps.
        helper: on the other ranks: what they sample with, if they do.
    """

    def __init__(self, policy: Policy, leader: Leader | None, helper: RankSampler | None) -> None:
        self._policy, self._first, self._helper = policy, leader, helper

    def collect(self, step: int) -> Collected:
        """The completions of a step, for which the policy is now as the step begins. Every rank calls it.

        Raises:
            RunError: every reward failed; the message lists the reasons.
            SamplerError: the sampler did.
        """
        state = self._policy.state() if active() else None  # sharded: all ranks have to give their part
        if self._helper:
            self._helper.load(step, self._policy, state)
        return lead(lambda: self._leader.collect(step, state), self._helper.help if self._helper else None)

    def keep(self, step: int, advantage: Mapping[str, object]) -> None:
        """Keep what the next step begins with, once `step` steps are made."""
        if self._first:
            self._first.keep(step, advantage)

    def restore(self, step: int) -> Mapping[str, object]:
        """Go on behind so many steps; returns what was kept of the advantage's memory."""
        return lead(lambda: self._leader.restore(step))

    def settle(self) -> None:
        """Return when what is sampled ahead needs no weights from before now."""
        if self._first and self._first.ahead:
            self._first.ahead.settle()

    @property
    def _leader(self) -> Leader:
        assert self._first is not None
        return self._first


class Leader:
    """Samples, scores and keeps what a step trains on; on rank 0."""

    def __init__(
        self, policy: Policy, config: OnlineConfig, rollouts: Rollouts, page: RolloutPage, ahead: Ahead | None
    ) -> None:
        self.policy, self.config, self.rollouts, self.page, self.ahead = policy, config, rollouts, page, ahead
        self._warned = False

    def collect(self, step: int, state: Mapping[str, Tensor] | None) -> Collected:
        """See `Collector.collect`.

        Args:
            state: the policy's state, where the policy itself does not hold its weights whole.
        """
        rollouts = self.rollouts
        rollouts.begin(step)
        if self.ahead:
            self.ahead.give(step, self.policy.state() if state is None else state)
            rollouts.seconds["sampling"] += self.ahead.wait(step)
        else:
            rollouts.sampler.load(step, self.policy, state)
        everything, kept = self._collect()
        speed = self.ahead.speed if self.ahead else rollouts.tokens / rollouts.seconds["sampling"]
        self.page.show(step + 1, everything)
        return Collected(everything, kept, rollouts.seconds, speed)

    def keep(self, step: int, advantage: Mapping[str, object]) -> None:
        """Keep what the next step begins with, once `step` steps are made."""
        rollouts = self.rollouts
        state = {"position": rollouts.position, "rewards": rollouts.rewards.state(), "advantage": advantage}
        rollouts.store.keep_state(step, state)

    def restore(self, step: int) -> Mapping[str, object]:
        """Take up what `keep` has kept; returns the advantage's part."""
        state = self.rollouts.store.state(step)
        self.rollouts.position = state["position"]
        self.rollouts.rewards.restore(state["rewards"])
        advantage: Mapping[str, object] = state["advantage"]
        return advantage

    def _collect(self) -> tuple[list[Rollout], list[Rollout]]:
        """All that was sampled for a step, and what of it is trained on."""
        wanted, again = self.config.batch_size, self.config.rollout.dynamic_sampling
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
        if reasons and not self._warned:
            self._warned = True
            print(f"Step {self.rollouts.step + 1}: {reasons}. metrics.jsonl counts what fails from here on.")
        return found

    def _scores(self, rollout: Rollout) -> Doubles:
        return scores_of(rollout, self.config.rollout, self.config.sampling.max_new_tokens)
