"""One round: sample → judge → agreement → reward model → DPO → evaluate against the baseline → report.

Every stage leaves its result on disk and is skipped when that is there, so an interrupted round goes on where it was.
The panel is simulated, and everything that shows its judgements says so.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from accord.config import Config
from accord.data import prompts as prompt_sets
from accord.errors import ConfigError, DataError
from accord.evaluate.answers import answer, answer_trees, complete, divergences, paired_outcomes, scores
from accord.evaluate.compare import Comparison, PairedOutcome, compare
from accord.evaluate.reward import RewardReport, evaluate_rewards
from accord.feedback.panel import Panel
from accord.feedback.quality import PanelAgreement, agreement
from accord.feedback.ranking import majority_ranking, ranked_pairs
from accord.files import write_text
from accord.loop.artifacts import read_records, write_records, write_rows
from accord.models.allocator import release_memory
from accord.models.load import load_policy, load_reward_model
from accord.models.network import Policy
from accord.models.render import Renderer, sampled_tree
from accord.models.trees import Tree
from accord.sampling.request import SamplingConfig
from accord.tracking import require_trackers
from accord.train import Run, TrainConfig, provenance, train, train_ensemble
from accord.types import Completion, Judgement, Message, Prompt

__all__ = ["Round", "RoundConfig", "quickstart_settings"]


class RoundConfig(Config):
    """Settings of a round."""

    model: str
    seed: int = Field(ge=0)
    train_prompts: int = Field(gt=0)
    reward_prompts: int = Field(gt=0)
    """The reward model learns from this many of them; the others measure its accuracy."""
    heldout_prompts: int = Field(gt=0)
    temperatures: tuple[float, ...]
    """One completion of every training prompt at each of these."""
    sampling: SamplingConfig
    reward: TrainConfig
    dpo: TrainConfig


def quickstart_settings() -> dict[str, Any]:
    """The values of quickstart.toml."""
    return tomllib.loads(resources.files("accord.loop").joinpath("quickstart.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Result:
    """What a round found, besides what lies on disk."""

    comparison: Comparison
    reward: RewardReport
    panel: PanelAgreement
    seconds: Mapping[str, float]
    peak_memory: int


class Round:
    """A round in a run directory. `run()` does what is not done yet."""

    def __init__(self, directory: Path, config: RoundConfig) -> None:
        self.directory, self.config = directory, config
        self.prompts = _take("train", config.train_prompts)
        self.heldout = _take("heldout", config.heldout_prompts)
        if config.sampling.temperature != 1.0:
            fix = "Set temperatures, e.g. --set temperatures=[0.5,1.0]"
            raise ConfigError("A round takes no single temperature.", where="sampling.temperature", fix=fix)
        if config.reward.data or config.dpo.data:
            raise ConfigError("A round makes its data itself.", where="reward.data, dpo.data", fix="Leave it out.")
        require_trackers([*config.reward.trackers, *config.dpo.trackers])
        if config.reward_prompts >= len(self.prompts):
            fix = "Set reward_prompts below train_prompts."
            raise DataError("No prompt is left to measure the reward model on.", where="reward_prompts", fix=fix)

    def run(self) -> Result:
        """All stages, in order."""
        completions = self._sample()
        judgements = self._judge(completions)
        panel = agreement([j for rows in judgements.values() for j in rows], seed=self.config.seed)
        ranks = {prompt: majority_ranking(rows) for prompt, rows in judgements.items()}
        self._write_preferences(completions, ranks)
        with self._timed("reward model"):
            self._train_reward(completions, ranks)
        with self._timed("DPO"):
            self._train_policy(completions, ranks)
        with self._timed("evaluation"):
            report = self._evaluate_reward(completions, ranks, panel)
            release_memory()
            outcomes = self._evaluate_policy()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Result(compare(outcomes), report, panel, self.seconds(), peak)

    def facts(self) -> dict[str, Any]:
        """What a round must share with the one that it continues."""
        asked = repr([(prompt.content, prompt.requirements) for prompt in (*self.prompts, *self.heldout)])
        data = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
        return {
            "data": data,
            "model": self.config.model,
            "template": "",
            "seed": self.config.seed,
            "panel": "simulated",
        }

    @property
    def model(self) -> Path:
        """The aligned model."""
        return self.directory / "dpo" / "model"

    def seconds(self) -> dict[str, float]:
        """Seconds spent on each stage so far, over all interruptions."""
        path = self.directory / "stages.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def _sample(self) -> dict[str, list[Completion]]:
        path = self.directory / "completions.jsonl"
        if not path.exists():
            with self._timed("sampling"):
                temperatures, config = self.config.temperatures, self.config.sampling
                policy = load_policy(self.config.model)
                sampled = complete(policy, self.prompts, temperatures, config, self.config.seed, "Sampling")
                write_records(path, Completion, sampled)
        by_prompt: dict[str, list[Completion]] = {}
        for completion in read_records(path, Completion):
            by_prompt.setdefault(completion.prompt_id, []).append(completion)
        # Four answers of which three are equal are two answers.
        return {prompt: list({each.text: each for each in rows}.values()) for prompt, rows in by_prompt.items()}

    def _judge(self, completions: Mapping[str, Sequence[Completion]]) -> dict[str, list[Judgement]]:
        path = self.directory / "judgements.jsonl"
        if not path.exists():
            panel = Panel(self.config.seed)
            judged = [each for prompt in self.prompts for each in panel.judge(prompt, completions[prompt.id])]
            write_records(path, Judgement, judged)
        by_prompt: dict[str, list[Judgement]] = {}
        for judgement in read_records(path, Judgement):
            by_prompt.setdefault(judgement.prompt_id, []).append(judgement)
        return by_prompt

    def _write_preferences(
        self, completions: Mapping[str, Sequence[Completion]], ranks: Mapping[str, tuple[int, ...]]
    ) -> None:
        """What was learnt from, as preference pairs in the columns that everyone reads."""
        rows = [
            {
                "prompt": _turns(prompt),
                "chosen": _turn(completions[prompt.id][better]),
                "rejected": _turn(completions[prompt.id][worse]),
                "kind": "simulated",
            }
            for prompt in self.prompts
            for better, worse in ranked_pairs(ranks[prompt.id])
        ]
        write_rows(self.directory / "preferences.jsonl", rows)

    def _train_reward(
        self, completions: Mapping[str, Sequence[Completion]], ranks: Mapping[str, tuple[int, ...]]
    ) -> None:
        run = Run(self.directory / "reward")
        if run.finished:
            return
        config = self.config.reward
        network = load_reward_model(self.config.model, config.reward_model, chat_template=config.template())
        renderer = Renderer(network, config.max_tokens)
        trees = self._rankings(renderer, self.prompts[: self.config.reward_prompts], completions, ranks)
        facts = provenance(network, self.config.model, "simulated panel", trees, config.seed)
        run = Run.open(run.directory, config, facts, resume=True)
        train_all = train_ensemble if config.reward_model.members > 1 else train
        train_all(network, trees, config, run, stage="Reward model")

    def _train_policy(
        self, completions: Mapping[str, Sequence[Completion]], ranks: Mapping[str, tuple[int, ...]]
    ) -> None:
        run = Run(self.directory / "dpo")
        if run.finished:
            return
        config = self.config.dpo
        network = load_policy(self.config.model, chat_template=config.template())
        renderer = Renderer(network, config.max_tokens)
        trees = self._rankings(renderer, self.prompts, completions, ranks)
        facts = provenance(network, self.config.model, "simulated panel", trees, config.seed)
        run = Run.open(run.directory, config, facts, resume=True)
        train(network, trees, config, run, stage="DPO")

    def _evaluate_reward(
        self,
        completions: Mapping[str, Sequence[Completion]],
        ranks: Mapping[str, tuple[int, ...]],
        panel: PanelAgreement,
    ) -> RewardReport:
        network = load_reward_model(str(self.directory / "reward" / "model"))
        trees = self._rankings(Renderer(network), self.prompts[self.config.reward_prompts :], completions, ranks)
        rewards = scores(network, trees, "Reward accuracy")
        pairs = [(tree, row, i, j) for tree, row in zip(trees, rewards, strict=True) for i, j in tree.pairs]
        return evaluate_rewards(
            [row[i] for _, row, i, _ in pairs],
            [row[j] for _, row, _, j in pairs],
            chosen_lengths=[len(tree.branches[i].tokens_L) for tree, _, i, _ in pairs],
            rejected_lengths=[len(tree.branches[j].tokens_L) for tree, _, _, j in pairs],
            ceiling=panel.ceiling,
        )

    def _evaluate_policy(self) -> list[PairedOutcome]:
        path = self.directory / "outcomes.jsonl"
        if path.exists():
            return read_records(path, PairedOutcome)
        baseline, seed = load_policy(self.config.model), self.config.seed
        # People read the most likely answers; the KL needs draws from the whole distribution.
        likely, drawn = (self.config.sampling.model_copy(update={"temperature": t}) for t in (0.0, 1.0))
        before = answer(baseline, self.heldout, likely, seed, "Answers before")
        candidate = load_policy(str(self.model))
        after = answer(candidate, self.heldout, likely, seed, "Answers after")
        draws = answer(candidate, self.heldout, drawn, seed, "Draws for KL")
        kl = divergences(baseline, self.heldout, draws, "KL from baseline")
        network = load_reward_model(str(self.directory / "reward" / "model"))
        both = [self._scored(network, baseline, answers) for answers in (before, after)]
        rewards = list(zip(*both, strict=True))
        outcomes = paired_outcomes(self.heldout, before, after, rewards=rewards, divergence=kl)
        write_records(path, PairedOutcome, outcomes)
        return outcomes

    def _scored(self, network: Any, policy: Policy, answers: Sequence[Completion]) -> list[float]:
        return [row[0] for row in scores(network, answer_trees(policy, self.heldout, answers), "Rewards")]

    def _rankings(
        self,
        renderer: Renderer,
        prompts: Sequence[Prompt],
        completions: Mapping[str, Sequence[Completion]],
        ranks: Mapping[str, tuple[int, ...]],
    ) -> list[Tree]:
        """One tree per prompt whose answers are not all tied."""
        trees = [
            sampled_tree(renderer.prompt(prompt.content), completions[prompt.id], ranks[prompt.id])
            for prompt in prompts
        ]
        return [tree for tree in trees if tree.pairs]

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            release_memory()
            seconds = self.seconds()
            seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - began
            write_text(self.directory / "stages.json", json.dumps(seconds, indent=2) + "\n")


def _take(split: str, count: int) -> tuple[Prompt, ...]:
    prompts = prompt_sets.load(split)  # type: ignore[arg-type]
    if count > len(prompts):
        fix = f"Set {split}_prompts to at most {len(prompts)}."
        raise DataError(f"There are {len(prompts)} {split} prompts, not {count}.", where=f"{split}_prompts", fix=fix)
    return prompts[:count]


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    content = prompt.content if not isinstance(prompt.content, str) else (Message("user", prompt.content),)
    return [{"role": message.role, "content": message.content} for message in content]


def _turn(completion: Completion) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": completion.text}]
