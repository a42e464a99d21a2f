"""What both sides of `online.py` sample from and learn: prompts, their order, the reward.

The plan is made once, written as JSON, and read by every worker process. The chat template is applied here, so that
both sides get plain text.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from offline_plan import WARMUP, Consumed, consumed

__all__ = [
    "COMPLETIONS",
    "LEARNING_RATE",
    "NEW_TOKENS",
    "PROMPTS",
    "SOURCE",
    "TASKS",
    "OnlinePlan",
    "Task",
    "closeness",
    "make_online_plan",
    "sampled",
]

Task = Literal["grpo", "rloo", "ppo"]
TASKS: tuple[Task, ...] = get_args(Task)
SOURCE = "hh_harmless/train.jsonl.gz"
PROMPTS, COMPLETIONS, NEW_TOKENS = 8, 4, 48
"""Of one step; a completion ends at the stop token or after so many tokens."""
LEARNING_RATE = 1e-6
"""Constant; AdamW with TRL's defaults: betas 0.9 and 0.999, no weight decay, gradient clipped to norm 1."""
_LONGEST = 512
"""Tokens of a prompt at most."""
_TARGET = 150
"""Characters that the reward wants: 48 tokens may be more or less."""


@dataclass(frozen=True, slots=True)
class OnlinePlan:
    """Prompts of plain text: step i, warm-up included, takes the next 8 of them.

    Attributes:
        left_out: prompts of the file that are too long.
    """

    task: Task
    prompts: list[str]
    left_out: int

    @property
    def steps(self) -> int:
        return len(self.prompts) // PROMPTS

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str) -> OnlinePlan:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def make_online_plan(task: Task, data: Path, tokenizer: Any, steps: int) -> OnlinePlan:
    """Draw the prompts of `steps` counted steps, and of the warm-up before them, from the file (seed 0)."""
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        chats = [json.loads(line)["prompt"] for line in lines]
    texts = list(
        dict.fromkeys(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats)
    )
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    fitting = [text for text in texts if len(tokenizer(text)["input_ids"]) <= _LONGEST]
    needed = (WARMUP + steps) * PROMPTS
    if len(fitting) < needed:
        raise SystemExit(f"{data} holds {len(fitting)} such prompts; {steps} steps need {needed}. Lower --steps.")
    return OnlinePlan(task, fitting[:needed], len(texts) - len(fitting))


def closeness(text: str) -> float:
    """The reward of a completion: how near its length comes to 150 characters, from −1 or less to 0."""
    return -abs(len(text) - _TARGET) / _TARGET


def sampled(prompts: Iterable[Sequence[int]], tokens: int) -> Consumed:
    """A step that sampled `tokens` tokens; the hash is that of its prompts, one for every completion."""
    return replace(consumed((ids, [False] * len(ids)) for ids in prompts), tokens=tokens)
