"""Checkpoints: trainable weights, optimiser state and step, through torch's distributed checkpoint (DCP).

A checkpoint is a directory that appears whole or not at all. Data order and random numbers are functions of the seed
and the step, so nothing else is needed to go on bit for bit.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from accord.engine.distributed import active, broadcast, gather, rank
from accord.engine.engine import Engine
from accord.errors import RunError
from accord.files import atomic_directory

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(engine: Engine, directory: Path, step: int, others: Sequence[Engine] = ()) -> None:
    """Write `directory/<step>`, then remove older checkpoints. Every rank writes its shard, rank 0 the directory.

    Args:
        others: engines that are trained beside it (a critic's).
    """
    with _one_directory(directory / str(step)) as temporary, _quiet():
        try:
            save(_states(engine, others), checkpoint_id=str(temporary), no_dist=not active())
        except CheckpointException as error:
            raise _cause(error) from None  # a full disk, say: what surrounds us knows how to explain it
    for old in _checkpoints(directory) if rank() == 0 else ():
        if int(old.name) < step:
            shutil.rmtree(old)


def load_checkpoint(engine: Engine, path: Path, others: Sequence[Engine] = ()) -> int:
    """Restore weights and optimiser, whatever number of ranks wrote them; returns the number of finished steps.

    Raises:
        RunError: the checkpoint belongs to another model or another set of trainable weights.
    """
    state = _states(engine, others)
    try:
        with _quiet():
            load(state, checkpoint_id=str(path), no_dist=not active())
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        fix = "Resume with the settings and the model that the run was started with, or start another --out."
        message = str(_cause(error)).strip().partition("\n")[0] or "it is damaged."
        raise RunError(f"This checkpoint does not fit the model: {message}", where=str(path), fix=fix) from None
    return int(path.name)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`, as rank 0 sees it."""
    newest = max(_checkpoints(directory), key=lambda path: int(path.name), default=None) if rank() == 0 else None
    return broadcast(newest)


@contextmanager
def _one_directory(path: Path) -> Iterator[Path]:
    """One temporary directory for all ranks; it takes its place once every rank has written."""
    if rank() > 0:
        yield broadcast(path)
    else:
        with atomic_directory(path) as temporary:
            yield broadcast(temporary)
    gather(None)


def _checkpoints(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []


def _states(engine: Engine, others: Sequence[Engine]) -> dict[str, Any]:
    state = _state(engine)
    for place, other in enumerate(others):
        state |= {f"{place}.{name}": tensor for name, tensor in _state(other).items()}
    return state


def _state(engine: Engine) -> dict[str, Any]:
    """Tensors by name. Reading into these tensors restores the engine: they are its own memory."""
    if engine.optimizer is None:
        raise ValueError("An engine without an optimiser has no state to save.")
    state: dict[str, Any] = {}
    for name, parameter in engine.network.model.named_parameters():
        if parameter.requires_grad:
            state[f"weight.{name}"] = parameter.detach()
            moments = engine.optimizer.state[parameter]
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
