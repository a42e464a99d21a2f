"""The prompts of the quickstart, our own writing: short requests, each with requirements that a program can check.

One JSON object per line: ``id``, ``prompt`` (one user message) and ``requirements`` (kind and options).
The held-out prompts have other topics and other wordings than the training prompts, in the same mixture of kinds.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Literal

from accord.data.requirements import parse
from accord.types import Message, Prompt, Source

__all__ = ["load"]


def load(split: Literal["train", "heldout"]) -> tuple[Prompt, ...]:
    """The quickstart prompts of one split, in file order."""
    name = f"quickstart_{split}.jsonl"
    lines = resources.files(__package__).joinpath(name).read_text(encoding="utf-8").splitlines()
    return tuple(_prompt(line, Source(name, number)) for number, line in enumerate(lines, start=1))


def _prompt(line: str, source: Source) -> Prompt:
    row = json.loads(line)
    messages = tuple(Message(**message) for message in row["prompt"])
    requirements = tuple(parse(requirement, str(source)) for requirement in row["requirements"])
    return Prompt(row["id"], messages, requirements, source)
