"""An ensemble of reward models: the same start, disjoint parts of the prompts, one model each."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Sequence, Sized

from accord.engine.distributed import rank
from accord.errors import EmptyDataError
from accord.files import atomic_directory
from accord.models.ensemble import describe
from accord.models.network import Network
from accord.models.trees import Tree
from accord.train.config import TrainConfig
from accord.train.offline import train
from accord.train.run import Run

__all__ = ["divide", "train_ensemble"]


def train_ensemble(network: Network, trees: Sized, config: TrainConfig, run: Run, *, stage: str) -> None:
    """Train `reward_model.members` copies of a reward model, each in a run directory of its own under members/.

    An interrupted ensemble goes on with the member that it was at.

    Raises:
        EmptyDataError: there are fewer prompts than members, or the rows stream from disk.
    """
    settings = config.reward_model
    if not isinstance(trees, Sequence):
        fix = "Divide it with `accord data split`, or set reward_model.members = 1."
        raise EmptyDataError("Data that streams from disk cannot be divided among the members.", fix=fix)
    alone = config.model_copy(update={"reward_model": settings.model_copy(update={"members": 1, "penalty": 0.0})})
    names = [str(number) for number in range(1, settings.members + 1)]
    runs = []
    for name, part in zip(names, divide(trees, settings.members, config.seed), strict=True):
        facts = {"data": f"part {name} of {settings.members}", "model": "", "template": ""}
        member = Run.open(run.directory / "members" / name, alone, facts, resume=True)
        if not member.finished:
            train(copy.deepcopy(network), part, alone, member, stage=f"{stage} {name}/{settings.members}")
        runs.append(member)
    if rank() > 0:
        return
    with atomic_directory(run.model) as temporary:
        for name, member in zip(names, runs, strict=True):
            shutil.copytree(member.model, temporary / name)
        describe(temporary, names, settings.penalty)
    for member in runs:
        shutil.rmtree(member.model)


def divide(trees: Sequence[Tree], count: int, seed: int) -> list[list[Tree]]:
    """Disjoint parts by prompt, equally many prompts each; drawn from the seed and the tokens of the prompts alone."""
    key = f"ensemble {seed}".encode()
    drawn = {
        prompt: hashlib.blake2b(prompt, digest_size=16, key=key).digest()
        for prompt in dict.fromkeys(tree.prompt_P.tobytes() for tree in trees)
    }
    if len(drawn) < count:
        fix = "Give more data, or lower reward_model.members."
        raise EmptyDataError(f"{len(drawn)} prompts cannot be divided among {count} models.", fix=fix)
    part_of = {prompt: place % count for place, prompt in enumerate(sorted(drawn, key=drawn.__getitem__))}
    parts: list[list[Tree]] = [[] for _ in range(count)]
    for tree in trees:
        parts[part_of[tree.prompt_P.tobytes()]].append(tree)
    return parts
