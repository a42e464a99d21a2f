"""Objects in processes of their own on a Ray cluster, beside the processes that train."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accord.errors import AccordError, ConfigError, RunError

__all__ = ["Actor", "InActor", "actors", "require_ray"]

_REPETITIONS = 3
"""How often a call is repeated whose process was lost under it."""


class Actor:
    """An object of a class, in a process that Ray starts anew whenever it is lost; it then begins without its past."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns. Where the process is lost under the call it is made again, up to three times.

        Raises:
            AccordError: the method raised it.
            RunError: it raised something else; or the process was lost once more.
        """
        import ray

        fix = "Ray's own log says more; then run the same command with --resume."
        try:
            return ray.get(getattr(self._handle, method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AccordError):
                raise error.cause from None
            what = f"A worker failed: {type(error.cause).__name__}: {error.cause}"
            raise RunError(what, where=f"Ray actor, {method}", fix=fix) from None
        except ray.exceptions.RayActorError as error:
            what = f"A worker was lost: {str(error).strip().partition(chr(10))[0]}"
            raise RunError(what, where=f"Ray actor, {method}", fix=fix) from None


class InActor:
    """What runs in the process of an actor: paths read there as they do in the process that started it."""

    def __init__(self, directory: str) -> None:
        with suppress(OSError):  # a machine without it finds what is named from the root
            os.chdir(directory)


@contextmanager
def actors(kind: type[InActor], arguments: tuple[Any, ...], count: int, gpus: float = 0) -> Iterator[list[Actor]]:
    """So many actors, each made by `kind(directory to work in, *arguments)`. They end with the context or this process.

    They ask for no CPU, so that they are never waiting for one that training occupies.

    Args:
        gpus: of each.
    """
    import ray

    options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": _REPETITIONS}
    # Ray puts what a training process starts into the job's own reservation, which has no room, unless told where.
    remote = ray.remote(kind).options(**options, scheduling_strategy="SPREAD")
    handles = [remote.remote(str(Path.cwd()), *arguments) for _ in range(count)]
    try:
        yield [Actor(handle) for handle in handles]
    finally:
        for handle in handles:
            ray.kill(handle)


def require_ray(where: str) -> None:
    """
    Raises:
        ConfigError: this process is none of a Ray cluster.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        fix = "Add --processes 1 --launcher ray (docs/scale.md), or leave it out."
        raise ConfigError("There is no Ray cluster to start workers on.", where=where, fix=fix)
