"""What both sides of `offline.py` train on: rows, order, settings, and the proof that both saw the same tokens.

The plan is made once, written as JSON, and read by every worker process. The chat template is applied to prompts here,
so that both sides get plain text and differ in nothing but how they train.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import torch

__all__ = [
    "BETA",
    "KEEP_MEMORY",
    "LEARNING_RATE",
    "PACK",
    "SOURCES",
    "TASKS",
    "WARMUP",
    "Consumed",
    "Plan",
    "Precision",
    "Task",
    "Worker",
    "consumed",
    "draw_score_head",
    "make_plan",
]

Task = Literal["dpo", "dpo_chat", "reward", "sft", "kto", "orpo"]
TASKS: tuple[Task, ...] = get_args(Task)
SOURCES: dict[Task, str] = dict.fromkeys(TASKS, "hh_harmless/train.jsonl.gz") | {
    "dpo_chat": "oasst_trees/pairs.jsonl.gz"
}
"""Rows of short answers; for `dpo_chat` those of a chat, both answers of 100 to 600 tokens."""
Precision = Literal["bfloat16", "float32"]

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc's settings for the peer; Accord sets its own in process (`accord.models.allocator`)."""
WARMUP = 2
"""Steps at the start that are trained and checked, but not timed."""
LEARNING_RATE: dict[Task, float] = dict.fromkeys(TASKS, 3e-6) | {"reward": 2e-5, "sft": 2e-5}
"""Constant; AdamW with TRL's defaults: betas 0.9 and 0.999, no weight decay, gradient clipped to norm 1."""
BETA = 0.1
PACK = 512
"""Tokens of one packed row of TRL's SFT."""
_BATCH = 4
"""Pairs, or packed rows, of one optimiser step; for KTO the pairs whose 8 answers make one."""
_CHAT_ANSWER, _CHAT_PROMPT = (100, 600), 400
"""Tokens of an answer of `dpo_chat` (from, to), and of its prompt at most: rows that nobody cuts at 1,024 tokens."""


_ROWS: dict[Task, int] = {"kto": 2 * _BATCH}


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows of plain text, and which of them each optimiser step trains on.

    Attributes:
        rows: (prompt, chosen, rejected); for SFT (prompt, chosen); for KTO (prompt, answer, "good" or "bad").
        steps: indices into `rows`, one list per optimiser step, warm-up included.
        order: the order in which TRL reads its own data set: the rows, or for SFT the rows that it packs them into.
        left_out: rows of the file that are too long, or for `dpo_chat` too short.
    """

    task: Task
    precision: Precision
    rows: list[list[str]]
    steps: list[list[int]]
    order: list[int]
    left_out: int

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str) -> Plan:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def make_plan(task: Task, data: Path, tokenizer: Any, steps: int, precision: Precision) -> Plan:
    """Draw the rows of `steps` counted steps, and of the warm-up before them, from the file (seed 0)."""
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    columns = ("chosen",) if task == "sft" else ("chosen", "rejected")
    rows = [[_render(tokenizer, row["prompt"]), *(row[column] for column in columns)] for row in found]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    needed = (WARMUP + steps) * _BATCH
    if task == "sft":
        return _packed_plan(rows, tokenizer, needed, precision)
    everything = len(rows)
    if task == "dpo_chat":
        rows = [row for row in rows if _like_a_chat(row, tokenizer)]
    if len(rows) < needed:
        raise SystemExit(f"{data} holds {len(rows)} such pairs; {steps} steps need {needed}. Lower --steps.")
    left_out = everything - len(rows)
    rows = rows[:needed]
    if task == "kto":
        # In TRL an answer's control is the next one of its batch: the good ones first, so that the prompts differ.
        rows = [
            [prompt, answer, label]
            for start in range(0, needed, _BATCH)
            for column, label in ((1, "good"), (2, "bad"))
            for prompt, answer in ((row[0], row[column]) for row in rows[start : start + _BATCH])
        ]
    return Plan(
        task, precision, rows, _batches(range(len(rows)), _ROWS.get(task, _BATCH)), list(range(len(rows))), left_out
    )


def _like_a_chat(row: list[str], tokenizer: Any) -> bool:
    prompt, *answers = (len(tokenizer(text)["input_ids"]) for text in row)
    low, high = _CHAT_ANSWER
    return prompt <= _CHAT_PROMPT and all(low <= answer <= high for answer in answers)


def _packed_plan(rows: list[list[str]], tokenizer: Any, needed: int, precision: Precision) -> Plan:
    """TRL packs whole documents, best fit; a step of Accord trains on exactly the documents of four such rows."""
    from datasets import Dataset
    from trl import pack_dataset

    lengths = [len(tokenizer(prompt + chosen + tokenizer.eos_token)["input_ids"]) for prompt, chosen in rows]
    fitting = [i for i, length in enumerate(lengths) if length <= PACK]
    # A little more than fills the packed rows, so that a best fit has something to choose from.
    enough = int(np.searchsorted(np.cumsum([lengths[i] for i in fitting]), 1.05 * needed * PACK)) + 1
    kept = fitting[:enough]
    owners = Dataset.from_dict({"row": [[place] * lengths[i] for place, i in enumerate(kept)]})
    packed = [list(dict.fromkeys(row)) for row in pack_dataset(owners, PACK, "bfd")["row"]]
    if len(packed) < needed:
        raise SystemExit(f"The data fill {len(packed)} packed rows; {needed} are needed. Lower --steps.")
    # Best fit sorts by length; drawn rows make every step alike.
    order = [int(i) for i in np.random.default_rng(0).permutation(len(packed))[:needed]]
    steps = [[row for place in batch for row in packed[place]] for batch in _batches(order)]
    return Plan("sft", precision, [rows[i] for i in kept], steps, order, len(rows) - len(fitting))


def _render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _batches(items: Sequence[int], size: int = _BATCH) -> list[list[int]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def draw_score_head(model: Any) -> None:
    """Fill `model.score` with normal numbers of deviation 0.02, seed 0: where both reward models start.

    Accord's own start, zeros, would make the losses agree whatever the network does.
    """
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, slots=True)
class Consumed:
    """What one step trained on: its real tokens (a prompt counts once per completion), and a hash of every sequence."""

    tokens: int
    digest: str


def consumed(sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Consumed:
    """From (tokens, which of them carry loss) of every sequence of a step, in any order."""
    texts = sorted(json.dumps([list(map(int, tokens)), list(map(int, mask))]) for tokens, mask in sequences)
    tokens = sum(len(json.loads(text)[0]) for text in texts)
    return Consumed(tokens, hashlib.blake2b("\n".join(texts).encode(), digest_size=16).hexdigest())


class Worker:
    """A worker process's line to `offline.py`: JSON lines on standard output, whatever else a library prints there."""

    def __init__(self) -> None:
        self._out: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def reference(self, seconds: float, rows: int) -> None:
        """The reference model's log-probabilities took so long."""
        self._say({"reference_seconds_per_pair": seconds / rows})

    def step(self, seconds: float, loss: float, said: Consumed) -> None:
        """One optimiser step is done."""
        self._say({"seconds": seconds, "loss": loss, **asdict(said)})

    def shares(self, shares: dict[str, float]) -> None:
        """What a counted step spends its time on, as shares of it."""
        self._say({"shares": shares})

    def end(self) -> None:
        """Peak memory of this process, in bytes."""
        self._say({"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})

    def _say(self, facts: dict[str, Any]) -> None:
        self._out.write(json.dumps(facts) + "\n")
