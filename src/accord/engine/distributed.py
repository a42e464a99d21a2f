"""The processes of a job: who this one is, what all of them know, how each takes its share.

One process alone has no process group: it is rank 0 of 1, and every function here costs it nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from accord.errors import AccordError, ConfigError, RunError

__all__ = [
    "active",
    "broadcast",
    "call_all",
    "compute_device",
    "gather",
    "in_job",
    "lead",
    "load_device",
    "process_group",
    "rank",
    "share",
    "world_size",
]

T = TypeVar("T")

LAUNCHED = "ACCORD_LAUNCHED"
"""Set where a process of ours has started this one and explains to the user how it ended."""


def active() -> bool:
    """Whether this process has joined a job, be it of one process."""
    return dist.is_available() and dist.is_initialized()


def in_job() -> bool:
    """Whether torchrun, Ray, or `--processes` started this process as one of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def compute_device() -> torch.device:
    """Where this process of a job computes: each has a GPU of its own, where there are any."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_device() -> torch.device | None:
    """Where a model is loaded before it is sharded, as a whole one may not fit onto a GPU; None: where it computes."""
    return torch.device("cpu") if active() else None


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    if not active():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value, on all ranks."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@dataclass(frozen=True, slots=True)
class _Call:
    body: Any


def lead(work: Callable[[], T], help: Callable[[Any], None] | None = None) -> T:
    """What `work` returns on rank 0, on all ranks; only there is it called.

    Args:
        help: called on the other ranks with whatever `work` gives to `call_all` meanwhile.

    Raises:
        AccordError: `work` raised it; then on all ranks, so that all can end alike.
    """
    outcome: Any = None
    if rank() == 0:
        try:
            outcome = work()
        except AccordError as error:
            outcome = error
        broadcast(outcome)
    else:
        while isinstance(outcome := broadcast(outcome), _Call):
            assert help is not None
            help(outcome.body)
    if isinstance(outcome, AccordError):
        raise outcome
    result: T = outcome
    return result


def call_all(body: object) -> None:
    """Inside `lead`, rank 0 has the other ranks `help` with this; then both do what is theirs."""
    broadcast(_Call(body))


def share(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which items each rank takes: the largest first, each to the rank with the least so far.

    Example:
        >>> share([5, 9, 4, 1], 2)
        [[1, 3], [0, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += sizes[index]
    return [sorted(mine) for mine in shares]


@contextmanager
def process_group() -> Iterator[None]:
    """Join the job that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, …), if it describes one.

    Only rank 0 writes to standard output. The first error of any rank is raised there; the other ranks then end without
    a word, so the user reads one message.

    Raises:
        ConfigError: there are more processes than GPUs on this machine.
        RunError: another process of the job has ended.
    """
    if not in_job():
        yield
        return
    joined = not active()  # Ray joins before it calls us, and leaves after
    if joined:
        _join()
    try:
        with _quiet() if rank() else nullcontext():
            yield
    except KeyboardInterrupt:
        if rank() or LAUNCHED in os.environ:
            raise SystemExit(128 + signal.SIGINT) from None
        raise
    except Exception as error:
        lost = _lost_peer(error)
        silent = not _first_to_fail() or (lost is not None and LAUNCHED in os.environ)
        if not joined:  # this process lives on: the others learn of the error from the closed connection
            dist.destroy_process_group()
        if silent:
            raise SystemExit(1) from None
        if lost is not None:
            raise lost from None
        raise
    if joined:
        dist.barrier()  # a rank that leaves while another still speaks to it makes that one abort
        dist.destroy_process_group()


def _join() -> None:
    device = compute_device()
    if device.type == "cuda":
        count, local = torch.cuda.device_count(), device.index
        if local >= count:
            what = f"Process {local} of this machine has no GPU: there are {count}."
            raise ConfigError(what, fix=f"Start at most {count} processes on each machine.")
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def _first_to_fail() -> bool:
    """Whether no other rank has failed before this one; the store outlives the ranks where torchrun keeps it."""
    try:
        return bool(dist.distributed_c10d._get_default_store().add("accord/failed", 1) == 1)
    except RuntimeError:
        return False


def _lost_peer(error: Exception) -> RunError | None:
    """The message for an error that says no more than that a collective operation has lost a process."""
    collective = isinstance(error, dist.DistError) or any(word in str(error) for word in _COLLECTIVE)
    if isinstance(error, AccordError) or not isinstance(error, RuntimeError) or not collective:
        return None
    what = "Another process of this job has ended, so this one cannot go on."
    return RunError(what, fix="Look at its last lines, then run the same command with --resume.")


_COLLECTIVE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")


@contextmanager
def _quiet() -> Iterator[None]:
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield
