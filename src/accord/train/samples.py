"""samples.html of a run: what the model says of a few training prompts before its first step, and after its last.

A policy continues them greedily; a reward model scores their completions. Nothing random is drawn while it does, so a
run with samples has the bits of one without.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accord.engine.distributed import rank
from accord.engine.engine import Engine
from accord.errors import DataError
from accord.models.network import Policy
from accord.models.trees import IntArray, Tree
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig
from accord.tracking import Progress, Sample, write_samples
from accord.train.examples import StreamedTrees, Trees
from accord.train.run import Run

__all__ = ["SamplePage"]

_NEW_TOKENS = 64
_SHARED = (
    "A model that processes share writes no samples.html. Look at it once it is trained: accord sample --model {} …"
)


class SamplePage:
    """The page of one run; it is made with the model as it is before training, and `finish` adds what came of it.

    A run that goes on from a checkpoint makes it before the checkpoint is loaded, so the page is the same.

    Args:
        count: prompts to draw with the seed; 0 for no page.
    """

    def __init__(self, engine: Engine, trees: Trees, run: Run, *, count: int, seed: int) -> None:
        self._engine, self._path = engine, run.directory / "samples.html"
        self._is_policy = isinstance(engine.network, Policy)
        if count and self._is_policy and engine.sharded:
            print(_SHARED.format(run.model))
            count = 0
        drawn = _draw(trees, count, seed) if count else []
        self._trees = [tree for tree in drawn if len(tree.prompt_P) or not self._is_policy]
        if self._trees:
            self._before = self._look("Samples before")
            self._write()

    def finish(self) -> None:
        """Add what the model says now."""
        if self._trees:
            self._write(self._look("Samples after"))

    def _look(self, stage: str) -> list[list[str]]:
        """Of every tree: its greedy completion, or the score of every branch."""
        policy = self._engine.network
        if not isinstance(policy, Policy):
            return [[f"{score[0]:.2f}" for score in scores] for scores in self._engine.forward(self._trees)]
        prompts = [tuple(tree.prompt_P.tolist()) for tree in self._trees]
        room = policy.context - max(map(len, prompts))
        config = SamplingConfig(temperature=0.0, max_new_tokens=min(_NEW_TOKENS, room))
        requests = [Request(f"sample {place}", ids, seed=0) for place, ids in enumerate(prompts)]
        with Progress(stage, len(requests), unit="tokens") as progress:
            sampler = LocalSampler(policy, self._engine.config.precision)
            done = sampler.sample(requests, config, on_finish=lambda _, c: progress.advance(1, work=len(c.token_ids)))
        return [[completion.text] for completion in done]

    def _write(self, after: Sequence[Sequence[str]] = ()) -> None:
        if rank() > 0:
            return
        about = self._completions if self._is_policy else self._scores
        samples = [
            Sample(self._text(tree.prompt_P, special=True), about(tree, *said))
            for tree, *said in zip(self._trees, self._before, *([after] if after else []), strict=True)
        ]
        what = f"Greedy completions of up to {_NEW_TOKENS} tokens" if self._is_policy else "Scores of completions"
        when = (
            "before the first step and after the last" if after else "before the first step; training is not finished"
        )
        write_samples(self._path, samples, "Samples", f"{what}, {when}.")

    def _completions(self, tree: Tree, *said: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """The best completion of the data, then what the model said."""
        heading, place = "Demonstration" if len(tree.branches) == 1 else "Chosen", tree.ranks.index(min(tree.ranks))
        if tree.labels:
            place = tree.labels.index(max(tree.labels))
            heading = "Thumb up" if tree.labels[place] else "Thumb down"
        mine = [(name, text) for name, (text,) in zip(("Before", "After"), said, strict=False)]
        return (heading, self._text(tree.branches[place].tokens_L)), *mine

    def _scores(self, tree: Tree, *said: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """The completions of the data, each with its score."""
        names = [f"Rank {place + 1}" for place in tree.ranks]
        if len(tree.branches) == 1:
            names = ["Completion"]
        elif sorted(tree.ranks) == [0, 1]:
            names = ["Rejected" if place else "Chosen" for place in tree.ranks]
        scores = [" → ".join(each) for each in zip(*said, strict=True)]
        return tuple(
            (f"{name} · score {score}", self._text(branch.tokens_L))
            for name, score, branch in zip(names, scores, tree.branches, strict=True)
        )

    def _text(self, tokens: IntArray, *, special: bool = False) -> str:
        return str(self._engine.network.tokenizer.decode(tokens.tolist(), skip_special_tokens=not special))


def _draw(trees: Trees, count: int, seed: int) -> list[Tree]:
    """Trees of different rows. One that cannot be used is left out here; training says so when it comes to it."""
    drawn: list[Tree] = []
    for row in np.random.default_rng([seed, len(trees)]).choice(len(trees), min(count, len(trees)), replace=False):
        try:
            drawn += trees.batch([int(row)])[:1] if isinstance(trees, StreamedTrees) else [trees[int(row)]]
        except DataError:
            continue
    return drawn
