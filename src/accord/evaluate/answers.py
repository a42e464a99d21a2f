"""Answers of two models to the same prompts, scored: the rows that a comparison reduces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from accord.data.requirements import describe, met
from accord.engine.engine import Engine, EngineConfig
from accord.errors import DataError
from accord.evaluate.compare import PairedOutcome
from accord.models.network import Policy, RewardModel
from accord.models.render import Renderer, sampled_tree, signature
from accord.models.trees import Tree
from accord.sampling.local import LocalSampler
from accord.sampling.request import SamplingConfig, requests_for
from accord.tracking import Progress
from accord.types import Completion, Content, Demonstration, Message, Prompt

__all__ = [
    "answer",
    "answer_trees",
    "complete",
    "divergences",
    "in_chunks",
    "judged_trees",
    "paired_outcomes",
    "scores",
]

_CHUNK = 64
"""Trees that the engine is given at once, so that progress shows."""

T = TypeVar("T")


def answer(
    policy: Policy, prompts: Sequence[Prompt], config: SamplingConfig, seed: int, stage: str
) -> tuple[Completion, ...]:
    """One completion per prompt. The random numbers depend on (seed, prompt) only: two models get the same ones."""
    return complete(policy, prompts, [config.temperature], config, seed, stage)


def complete(
    policy: Policy,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    config: SamplingConfig,
    seed: int,
    stage: str,
) -> tuple[Completion, ...]:
    """One completion per prompt and temperature, prompt by prompt, with visible progress."""
    requests = requests_for(prompts, Renderer(policy), temperatures, seed)
    with Progress(stage, len(requests), unit="tokens") as progress:
        sampler = LocalSampler(policy)
        return tuple(
            sampler.sample(requests, config, on_finish=lambda _, c: progress.advance(1, work=len(c.token_ids)))
        )


def answer_trees(policy: Policy, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[Tree]:
    """Each prompt with its answer, in the sampler's own tokens."""
    renderer = Renderer(policy)
    pairs = zip(prompts, answers, strict=True)
    return [sampled_tree(renderer.prompt(p.content, p.source), [each], (0,), p.source) for p, each in pairs]


def judged_trees(
    judge: RewardModel, policy: Policy, prompts: Sequence[Prompt], answers: Sequence[Completion]
) -> list[Tree]:
    """Each prompt with its answer as the judge reads it.

    In the sampler's own tokens where policy and judge have the same tokenizer and template, else rendered anew.

    Raises:
        RowError: a prompt is longer than the judge's context.
    """
    if signature(judge.tokenizer) == signature(policy.tokenizer):
        return answer_trees(policy, prompts, answers)
    renderer = Renderer(judge)
    return [
        renderer.tree(Demonstration(prompt.content, _as_content(each.text, prompt), prompt.source))
        for prompt, each in zip(prompts, answers, strict=True)
    ]


def _as_content(text: str, prompt: Prompt) -> Content:
    return text if isinstance(prompt.content, str) else (Message("assistant", text),)


def divergences(baseline: Policy, prompts: Sequence[Prompt], answers: Sequence[Completion], stage: str) -> list[float]:
    """Σ (log π_candidate − log π_baseline) over each answer of the candidate, in nats.

    Raises:
        DataError: the answers were not sampled at temperature 1, so their mean would be no estimate of the KL.
    """
    if any(each.temperature != 1.0 for each in answers):
        raise DataError("KL is measured on samples at temperature 1 only.", fix="Sample with temperature = 1.")
    engine = Engine(baseline, EngineConfig())
    said = in_chunks(engine.forward, answer_trees(baseline, prompts, answers), stage)
    return [
        float(np.sum(each.raw_logprobs, dtype=np.float64) - np.sum(values, dtype=np.float64))
        for each, (values,) in zip(answers, said, strict=True)
    ]


def scores(reward_model: RewardModel, trees: Sequence[Tree], stage: str) -> list[list[float]]:
    """The score of every branch of every tree."""
    said = in_chunks(Engine(reward_model, EngineConfig()).forward, trees, stage)
    return [[float(branch[0]) for branch in answers] for answers in said]


def in_chunks(forward: Callable[[Sequence[Tree]], Sequence[T]], trees: Sequence[Tree], stage: str) -> list[T]:
    """What `forward` says of each tree, a few at a time, with visible progress."""
    rows: list[T] = []
    with Progress(stage, len(trees), unit="tokens") as progress:
        for start in range(0, len(trees), _CHUNK):
            chunk = trees[start : start + _CHUNK]
            rows += forward(chunk)
            progress.advance(len(chunk), work=sum(map(len, chunk)))
    return rows


def paired_outcomes(
    prompts: Sequence[Prompt],
    before: Sequence[Completion],
    after: Sequence[Completion],
    *,
    rewards: Sequence[tuple[float, float]] | None = None,
    divergence: Sequence[float] | None = None,
) -> list[PairedOutcome]:
    """Check both answers of every prompt against its requirements and put everything known about them together."""
    outcomes = []
    for index, (prompt, old, new) in enumerate(zip(prompts, before, after, strict=True)):
        text = prompt.content if isinstance(prompt.content, str) else prompt.content[-1].content
        outcomes.append(
            PairedOutcome(
                prompt_id=prompt.id,
                prompt=text,
                requirements=tuple(requirement.kind for requirement in prompt.requirements),
                met_before=met(prompt.requirements, old.text),
                met_after=met(prompt.requirements, new.text),
                text_before=old.text,
                text_after=new.text,
                tokens_before=len(old.token_ids),
                tokens_after=len(new.token_ids),
                reward_before=rewards[index][0] if rewards else None,
                reward_after=rewards[index][1] if rewards else None,
                kl=divergence[index] if divergence else None,
                phrases=tuple(describe(requirement) for requirement in prompt.requirements),
            )
        )
    return outcomes
