"""What the evidence on guessing shares: a model that gives one of four answers, then 0 to 8 tildes, worth nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from reversal import taught

from accord.models.network import Policy
from accord.types import Demonstration

ANSWERS, MOST_TILDES = 4, 8
QUESTION = "?"
_LESSONS = 20


def guesser(directory: Path, seed: int) -> Path:
    """A model trained from scratch that gives each answer as often, and each number of tildes."""
    random, lessons = np.random.default_rng(seed), iter(range(_LESSONS))

    def demonstrations(count: int) -> list[Demonstration]:
        tildes, answers = random.integers(0, MOST_TILDES + 1, count), random.integers(1, ANSWERS + 1, count)
        rows = zip(answers.tolist(), tildes.tolist(), strict=True)
        return [Demonstration(QUESTION, f"{answer}{'~' * number}") for answer, number in rows]

    def enough(policy: Policy) -> bool:  # noqa: ARG001
        return next(lessons, None) is None

    return taught(directory, seed, demonstrations, enough)


def questions(path: Path, answers: Sequence[int]) -> Path:
    """Prompts that all ask the same, each with its answer, JSON lines."""
    rows = [{"id": str(row), "prompt": QUESTION, "answer": str(answer)} for row, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
