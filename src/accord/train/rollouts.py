"""Prompts → completions → rewards, kept on disk as they come: a killed run goes on with what it has.

runs/<name>/rollouts.sqlite: every completion with its tokens, log-probabilities and stop reason, by (step, prompt, k);
the rewards of a round of sampling; what rewards, advantages and the order of prompts carry from step to step.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from accord.errors import ResourceError, RowError, RunError
from accord.files import disk_errors
from accord.models.render import Renderer, Tools
from accord.models.trees import IntArray
from accord.rewards import Rewards
from accord.sampling.local import LocalSampler
from accord.sampling.replica import RankSampler
from accord.sampling.request import Request, SamplingConfig, completion_seed
from accord.sampling.sampler import Sampler
from accord.train.conversations import Conversations
from accord.types import Completion, Prompt, Reward

__all__ = ["EncodedPrompt", "Rollout", "RolloutStore", "Rollouts", "encode_prompts"]

_FILE = "rollouts.sqlite"
_COMPLETION = TypeAdapter(Completion)
_REWARDS = TypeAdapter(list[Reward])


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """A prompt and its tokens.

    Example: ``EncodedPrompt(Prompt("p-001", "2 + 2 ="), np.array([1, 4093, 198]))``
    """

    prompt: Prompt
    ids_P: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """A prompt, K completions of it, and what each is worth."""

    prompt: EncodedPrompt
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...]


def encode_prompts(
    renderer: Renderer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    skipped: list[RowError] | None = None,
    tools: Tools = (),
) -> list[EncodedPrompt]:
    """The tokens of every prompt.

    Args:
        tools: what the prompts show to be called, as JSON schemas.
        skipped: takes what is wrong with prompts that cannot be used, which are then left out.

    Raises:
        RowError: a prompt leaves no room for `max_new_tokens`, and there is no `skipped`; or none can be used.
    """
    encoded = []
    for prompt in prompts:
        try:
            where, ids_P = str(prompt.source or prompt.id), renderer.prompt(prompt.content, prompt.source, tools)
            if len(ids_P) == 0:
                raise RowError("The prompt has no tokens.", where=where, fix="Remove the row.")
            if len(ids_P) + max_new_tokens > renderer.max_tokens:
                what = (
                    f"The prompt has {len(ids_P)} tokens, and with max_new_tokens = {max_new_tokens} that is more than "
                    f"the limit of {renderer.max_tokens}."
                )
                fix = "Shorten or remove the row, lower sampling.max_new_tokens, or raise max_tokens."
                raise RowError(what, where=where, fix=fix)
            encoded.append(EncodedPrompt(prompt, ids_P))
        except RowError as error:
            if skipped is None:
                raise
            skipped.append(error)
    if skipped and not encoded:
        raise skipped[0]
    return encoded


class RolloutStore:
    """The file of one run. A row is there as soon as the call that writes it returns, whatever happens to the process.

    Example: ``RolloutStore(Path("runs/grpo"))``
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / _FILE
        with disk_errors(self.path):
            self._file = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            for table in (
                "completions (step INTEGER, prompt INTEGER, k INTEGER, version INTEGER, completion TEXT NOT NULL, "
                "PRIMARY KEY (step, prompt, k))",
                "rewards (step INTEGER, round INTEGER, rewards TEXT NOT NULL, state TEXT NOT NULL, "
                "PRIMARY KEY (step, round))",
                "states (step INTEGER PRIMARY KEY, state TEXT NOT NULL)",
            ):
                self._file.execute(f"CREATE TABLE IF NOT EXISTS {table}")

    def close(self) -> None:
        self._file.close()

    def completions(self, step: int, prompts: range) -> dict[tuple[int, int], Completion]:
        """Those that are there of a step's prompts, by (place of the prompt in the step, k)."""
        rows = self._file.execute(
            "SELECT prompt, k, completion FROM completions WHERE step = ? AND prompt >= ? AND prompt < ?",
            (step, prompts.start, prompts.stop),
        )
        return {(prompt, k): _COMPLETION.validate_json(text) for prompt, k, text in rows}

    def keep(self, step: int, prompt: int, k: int, completion: Completion) -> None:
        """Keep a completion, in the place of an earlier one."""
        text = _COMPLETION.dump_json(completion).decode()
        self._write("completions", (step, prompt, k, completion.policy_version, text))

    def rewards(self, step: int, round: int) -> tuple[list[Reward], dict[str, Any]] | None:
        """The rewards of a round, and the state of the reward functions after it."""
        query = "SELECT rewards, state FROM rewards WHERE step = ? AND round = ?"
        row = self._file.execute(query, (step, round)).fetchone()
        return (_REWARDS.validate_json(row[0]), json.loads(row[1])) if row else None

    def keep_rewards(self, step: int, round: int, rewards: Sequence[Reward], state: Mapping[str, Any]) -> None:
        """Keep the rewards of a round."""
        self._write("rewards", (step, round, _REWARDS.dump_json(list(rewards)).decode(), json.dumps(state)))

    def state(self, step: int) -> dict[str, Any]:
        """What was kept when so many steps were made.

        Raises:
            RunError: nothing was.
        """
        row = self._file.execute("SELECT state FROM states WHERE step = ?", (step,)).fetchone()
        if row is None:
            what = f"Nothing is kept here of step {step}, so this run cannot be continued."
            raise RunError(what, where=str(self.path), fix="Start another --out.")
        found: dict[str, Any] = json.loads(row[0])
        return found

    def keep_state(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep what the next step begins with, once `step` steps are made."""
        self._write("states", (step, json.dumps(state)))

    def _write(self, table: str, values: tuple[Any, ...]) -> None:
        try:
            marks = ", ".join("?" * len(values))
            self._file.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", values)
        except sqlite3.OperationalError as error:
            fix = "Make room or mend that, then run the same command with --resume."
            raise ResourceError(f"Cannot write this: {error}.", where=str(self.path), fix=fix) from None


class Rollouts:
    """Samples and scores, step by step, round by round.

    Args:
        prompts: all there are; each is taken once before any comes again, in an order that the seed decides.
        conversations: where an environment answers; a completion is then a whole conversation.

    Attributes:
        position: how many prompts were taken so far.
        seconds: what sampling and rewards have taken since `begin`, and `tokens`, how many were sampled.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        sampler: Sampler,
        rewards: Rewards,
        store: RolloutStore,
        sampling: SamplingConfig,
        *,
        completions: int,
        seed: int,
        conversations: Conversations | None = None,
    ) -> None:
        self.prompts, self.sampler, self.rewards, self.store, self.sampling = prompts, sampler, rewards, store, sampling
        self.count, self.seed, self.position, self.conversations = completions, seed, 0, conversations
        self.begin(0)

    def begin(self, step: int) -> None:
        """From now on, what is collected belongs to this step."""
        self.step, self.round, self.taken = step, 0, 0
        self.tokens, self.seconds = 0, {"sampling": 0.0, "reward": 0.0}

    def collect(self, count: int) -> list[Rollout]:
        """The next `count` prompts with completions and rewards; what is kept of them is not made again."""
        began = time.perf_counter()
        prompts, completions = self.complete(count)
        sampled = time.perf_counter()
        rewards = self._rewards(prompts, completions)
        self.seconds["sampling"] += sampled - began
        self.seconds["reward"] += time.perf_counter() - sampled
        self.position, self.taken, self.round = self.position + count, self.taken + count, self.round + 1
        return [
            Rollout(prompt, tuple(completions[start : start + self.count]), tuple(rewards[start : start + self.count]))
            for start, prompt in zip(range(0, len(completions), self.count), prompts, strict=True)
        ]

    def complete(self, count: int) -> tuple[list[EncodedPrompt], list[Completion]]:
        """The next `count` prompts with their completions, without rewards; `collect` then finds these kept."""
        prompts = [self.prompts[self._row(self.position + i)] for i in range(count)]
        return prompts, self._completions(prompts)

    def _completions(self, prompts: Sequence[EncodedPrompt]) -> list[Completion]:
        places = [(self.taken + i, k) for i in range(len(prompts)) for k in range(self.count)]
        kept = self.store.completions(self.step, range(self.taken, self.taken + len(prompts)))
        wanted = [place for place in places if place not in kept]
        if wanted and isinstance(self.sampler, LocalSampler | RankSampler):
            # The last bits of log-probabilities depend on what else is in the batch. So a round that was interrupted is
            # sampled again as a whole: the same tokens, and the same bits as without the interruption.
            wanted = places
        requests = [
            Request(
                prompts[i - self.taken].prompt.id,
                tuple(prompts[i - self.taken].ids_P.tolist()),
                completion_seed(self.seed, f"{self.step}/{i}", k),
            )
            for i, k in wanted
        ]

        def keep(index: int, completion: Completion) -> None:
            self.store.keep(self.step, *wanted[index], completion)
            kept[wanted[index]] = completion
            self.tokens += completion.length

        if requests and self.conversations:
            table = self.conversations.table([prompts[i - self.taken].prompt for i, _ in wanted], requests)
            self.sampler.sample(
                table.requests,
                self.sampling,
                on_finish=lambda index, _: keep(index, table.completion(index)),
                follow=table.follow,
            )
        elif requests:
            self.sampler.sample(requests, self.sampling, on_finish=keep)
        return [kept[place] for place in places]

    def _rewards(self, prompts: Sequence[EncodedPrompt], completions: Sequence[Completion]) -> list[Reward]:
        found = self.store.rewards(self.step, self.round)
        if found:
            self.rewards.restore(found[1])
            return found[0]
        owners = [prompt.prompt for prompt in prompts for _ in range(self.count)]
        rewards = self.rewards(owners, completions)
        if any(reward.value is not None for reward in rewards):  # else the run stops, and is to try them again
            self.store.keep_rewards(self.step, self.round, rewards, self.rewards.state())
        return rewards

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.prompts))
        return int(_order(self.seed, epoch, len(self.prompts))[place])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> IntArray:
    return np.random.default_rng([seed, epoch]).permutation(rows)
