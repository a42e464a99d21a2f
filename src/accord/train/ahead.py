"""Sampling while training: a thread samples the steps that follow, with weights at most so many steps old.

Step n is sampled by the weights that step max(0, n − max_staleness) begins with, whatever is faster, so what a step
trains on is a function of the settings. Completions go to the file of rollouts, where their step finds them; never are
more than `max_staleness` steps kept or under way that training has not come to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

from torch import Tensor

from accord.models.network import Policy
from accord.sampling.sampler import Sampler
from accord.train.online_config import OnlineConfig
from accord.train.rollouts import Rollouts, RolloutStore
from accord.types import Completion

__all__ = ["Ahead"]


class Ahead:
    """One thread, which samples step after step from copies of the policy's weights.

    Attributes:
        speed: tokens per second with which the step was sampled that was waited for last; 0 if it was there before.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        make: Callable[[RolloutStore], Rollouts],
        directory: Path,
        config: OnlineConfig,
        steps: range,
    ) -> None:
        """
        Args:
            sampler: one that keeps the weights which it is given: a server's, or a `Replica`.
            make: rollouts with this sampler and this file, for the thread.
            directory: that of the run.
        """
        self._policy, self._sampler, self._make, self._directory = policy, sampler, make, directory
        self._batch_size, self._max_staleness, self._stop = config.batch_size, config.rollout.max_staleness, steps.stop
        self._given = self._finished = steps.start
        self._jobs: SimpleQueue[tuple[int, int, Mapping[str, Tensor]] | None] = SimpleQueue()
        self._speeds: dict[int, float] = {}
        self._news, self._unwanted = threading.Condition(), threading.Event()
        self._error: BaseException | None = None
        self.speed = 0.0
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    def give(self, version: int, state: Mapping[str, Tensor]) -> None:
        """This is the policy's state as step `version` begins with it: let it sample what may be sampled by now."""
        end = min(version + self._max_staleness + 1, self._stop)
        if self._given >= end:
            return
        copies = {id(tensor): tensor.clone() for tensor in state.values()}  # tied weights stay one
        weights = {name: copies[id(tensor)] for name, tensor in state.items()}
        for step in range(self._given, end):
            self._jobs.put((step, version, weights))
        self._given = end

    def wait(self, step: int) -> float:
        """Return when all completions of a step are kept; how many seconds that took.

        Raises:
            Exception: what the sampler has raised.
        """
        began = time.perf_counter()
        with self._news:
            self._news.wait_for(lambda: self._finished > step or self._error is not None)
        if self._finished <= step and self._error is not None:
            raise self._error
        self.speed = self._speeds.pop(step)
        return time.perf_counter() - began

    def settle(self) -> None:
        """Return when everything that was given is sampled, or nothing more will be.

        A checkpoint that is written then can do without older weights: all that they have to sample is kept.
        """
        with self._news:
            self._news.wait_for(lambda: self._finished == self._given or self._error is not None)

    def close(self) -> None:
        """End the thread, behind the completion that it has under way."""
        self._unwanted.set()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with closing(_Store(self._directory, self._unwanted)) as store:
                rollouts = self._make(store)
                loaded = -1
                while (job := self._jobs.get()) is not None and not self._unwanted.is_set():
                    step, version, weights = job
                    if version != loaded:
                        self._sampler.load(version, self._policy, weights)
                        loaded = version
                    self._sample(rollouts, step)
        except BaseException as error:  # it is raised again where the step is waited for
            with self._news:
                self._error = error
                self._news.notify_all()

    def _sample(self, rollouts: Rollouts, step: int) -> None:
        rollouts.begin(step)
        rollouts.position = step * self._batch_size
        began = time.perf_counter()
        rollouts.complete(self._batch_size)
        with self._news:
            self._speeds[step] = rollouts.tokens / (time.perf_counter() - began)
            self._finished = step + 1
            self._news.notify_all()


class _UnwantedError(Exception):
    """Ends a call of the sampler whose completions nobody waits for any more."""


class _Store(RolloutStore):
    """Keeps completions while they are wanted."""

    def __init__(self, directory: Path, unwanted: threading.Event) -> None:
        super().__init__(directory)
        self._unwanted = unwanted

    def keep(self, step: int, prompt: int, k: int, completion: Completion) -> None:
        """Keep a completion; then end the sampling if it is unwanted."""
        super().keep(step, prompt, k, completion)
        if self._unwanted.is_set():
            raise _UnwantedError
