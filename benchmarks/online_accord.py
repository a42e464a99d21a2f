"""Accord's side of `online.py`: the whole of `accord train RECIPE` after loading. Started by `online.py`.

Seconds and shares of a step are those of the run's own metrics.jsonl: prompts in, weights updated, what was sampled
kept on disk.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from accord.models.load import load_policy
from accord.models.render import Renderer
from accord.models.starter import STARTER
from accord.rewards import Rewards
from accord.tracking.metrics import read_metrics
from accord.train import OnlineConfig, Run, encode_prompts, method_of, provenance, resolve_online, train_online
from accord.train.rollouts import EncodedPrompt, RolloutStore
from accord.types import Completion, Prompt
from offline_plan import WARMUP, Worker
from online_plan import COMPLETIONS, LEARNING_RATE, NEW_TOKENS, PROMPTS, OnlinePlan, closeness, sampled

CPU = torch.device("cpu")


def main(path: str) -> None:
    plan, worker = OnlinePlan.read(path), Worker()
    config = resolve_online(plan.task, extra=_settings(plan))
    policy = load_policy(STARTER, device=CPU)
    records = [Prompt(f"{index}", text) for index, text in enumerate(plan.prompts)]
    prompts = encode_prompts(Renderer(policy), records, NEW_TOKENS)
    with tempfile.TemporaryDirectory() as directory:
        facts = provenance(policy, STARTER, "prompts", [], config.seed)
        run = Run.open(Path(directory) / "run", config, facts, resume=False)
        train_online(
            policy,
            _as_drawn(prompts, config),
            Rewards(config.rewards, policy.tokenizer),
            config,
            run,
            stage=plan.task,
            reference=load_policy(STARTER, device=CPU) if method_of(config).reads_reference else None,
        )
        _tell(run, prompts, worker)
    worker.end()


def rewards(_prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """The reward, as Accord calls one."""
    return [closeness(completion.text) for completion in completions]


def _settings(plan: OnlinePlan) -> dict[str, object]:
    """What must be set to do the same work as TRL; everything else is the recipe's."""
    return {
        "steps": plan.steps,
        "batch_size": PROMPTS,
        "rollout": {"completions": COMPLETIONS},
        "sampling": {"max_new_tokens": NEW_TOKENS},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0.0},
        "engine": {"precision": "bfloat16"},
        "rewards": [{"name": "online_accord:rewards"}],
    }


def _as_drawn(prompts: Sequence[EncodedPrompt], config: OnlineConfig) -> list[EncodedPrompt]:
    """Prompts placed so that a run, which draws them in an order of its own, takes them in the plan's.

    The hash of each step's prompts, as its completions name them, says whether it did.
    """
    placed = list(prompts)
    for place, prompt in zip(np.random.default_rng([config.seed, 0]).permutation(len(prompts)), prompts, strict=True):
        placed[place] = prompt
    return placed


def _tell(run: Run, prompts: Sequence[EncodedPrompt], worker: Worker) -> None:
    rows = read_metrics(run.directory)
    with closing(RolloutStore(run.directory)) as store:
        for step, row in enumerate(rows):
            completions = store.completions(step, range(PROMPTS)).values()
            ids = [prompts[int(completion.prompt_id)].ids_P.tolist() for completion in completions]
            tokens = sum(len(completion.token_ids) for completion in completions)
            worker.step(row["seconds"], row["loss"], sampled(ids, tokens))
    shares = [name for name in rows[0] if name.startswith("time/")]
    worker.shares({name[5:]: statistics.mean(row[name] for row in rows[WARMUP:]) for name in shares})


if __name__ == "__main__":
    main(sys.argv[1])
