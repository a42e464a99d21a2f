"""Checkpoints: trainable weights, optimiser state and step, through torch's distributed checkpoint (DCP).

A checkpoint is a directory that appears whole or not at all. Data order and random numbers are functions of the seed
and the step, so nothing else is needed to go on bit for bit.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from accord.engine.engine import Engine
from accord.errors import RunError
from accord.files import atomic_directory

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(engine: Engine, directory: Path, step: int) -> None:
    """Write `directory/<step>`, then remove older checkpoints."""
    with atomic_directory(directory / str(step)) as temporary, _quiet():
        try:
            save(_state(engine), checkpoint_id=str(temporary), no_dist=True)
        except CheckpointException as error:
            raise _cause(error) from None  # a full disk, say: what surrounds us knows how to explain it
    for old in _checkpoints(directory):
        if int(old.name) < step:
            shutil.rmtree(old)


def load_checkpoint(engine: Engine, path: Path) -> int:
    """Restore weights and optimiser; returns the number of finished steps.

    Raises:
        RunError: the checkpoint belongs to another model or another set of trainable weights.
    """
    state = _state(engine)
    try:
        with _quiet():
            load(state, checkpoint_id=str(path), no_dist=True)
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        fix = "Resume with the settings and the model that the run was started with, or start another --out."
        message = str(_cause(error)).strip().partition("\n")[0] or "it is damaged."
        raise RunError(f"This checkpoint does not fit the model: {message}", where=str(path), fix=fix) from None
    return int(path.name)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`."""
    return max(_checkpoints(directory), key=lambda path: int(path.name), default=None)


def _checkpoints(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []


def _state(engine: Engine) -> dict[str, Any]:
    """Tensors by name. Reading into these tensors restores the engine: they are its own memory."""
    if engine.optimizer is None:
        raise ValueError("An engine without an optimiser has no state to save.")
    state: dict[str, Any] = {}
    for name, parameter in engine.network.model.named_parameters():
        if parameter.requires_grad:
            moments = engine.optimizer.state[parameter]
            if not moments:
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                moments |= {"step": torch.zeros((), dtype=torch.float32), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            state[f"weight.{name}"] = parameter.detach()
            state |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
    return state


def _cause(error: BaseException) -> BaseException:
    """What went wrong inside DCP, which wraps the exceptions of all ranks in one."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return next((exception for exception, _ in failures.values()), error)


class _quiet(warnings.catch_warnings):  # noqa: N801
    """DCP warns that no process group exists: that is how it is meant here."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
