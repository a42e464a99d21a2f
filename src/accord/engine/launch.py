"""Start a command as a job of many processes: on this machine (torchrun's elastic agent), or on a Ray cluster.

The command is one of Accord's own; its processes find each other through the environment (`accord.engine.distributed`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from accord.engine.distributed import LAUNCHED
from accord.errors import ConfigError, ResourceError, RunError

__all__ = ["on_ray", "on_this_machine"]

_GRACE_S = 600
"""How long a job that is stopped with Ctrl-C may take to finish its step and to save."""


def on_this_machine(arguments: Sequence[str], processes: int) -> int:
    """Run `accord ARGUMENTS` as `processes` processes of this machine; returns the exit code.

    Raises:
        ConfigError: there are fewer GPUs than processes.
        RunError: a process was killed. One that failed has said so itself.
        KeyboardInterrupt: the job was stopped with Ctrl-C.
    """
    _require_devices(processes)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # its loggers have levels of their own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=_GRACE_S,
    )
    try:
        launch_agent(config, sys.executable, ["-m", "accord", *arguments])
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        codes = {number: failure.exitcode for number, failure in error.failures.items()}
        # Once one process has ended, the agent ends the others with SIGTERM: theirs is not the cause.
        cause = sorted(codes.items(), key=lambda item: (item[1] == -signal.SIGTERM, item[1] > 0))
        number, code = cause[0]
        if code > 0:
            return code
        what = f"Process {number} of {processes} was killed ({signal.Signals(-code).name})."
        fix = "Run the same command with --resume. SIGKILL is mostly the system's answer to too little memory."
        raise RunError(what, fix=fix) from None
    finally:
        del os.environ[LAUNCHED]
    return 0


def on_ray(run: Callable[[Sequence[str]], int], arguments: Sequence[str], processes: int, out: Path) -> int:
    """Run `run(arguments)` as a Ray Train job of `processes` workers; a lost worker restarts the job up to three times.

    Args:
        run: an importable function that returns an exit code; it runs in this process's working directory, where the
            machine of the worker has that.
        arguments: of a command that goes on from its last checkpoint when it is run again.
        out: the run's directory, which every machine of the cluster must see; Ray's own files go to `out`/ray.

    Raises:
        ResourceError: Ray is not installed.
        RunError: the job was lost more often than that.
    """
    try:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
    except ImportError:
        fix = 'Install it: pip install "accord[ray]"'
        raise ResourceError("Ray is not installed.", where="--launcher ray", fix=fix) from None
    if not ray.is_initialized():
        # Its own print would write on every rank, and what we print twice.
        ray.init(runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}}, log_to_driver=True)
    gpu = torch.cuda.is_available()
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"run": run, "arguments": list(arguments), "directory": str(Path.cwd())},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=processes, use_gpu=gpu),
        run_config=ray.train.RunConfig(
            name="ray", storage_path=str(out.absolute()), failure_config=ray.train.FailureConfig(max_failures=3)
        ),
    )
    try:
        return int(trainer.fit().return_value)
    except TrainingFailedError as error:
        what = f"The job was lost: {str(error).strip().partition(chr(10))[0]}"
        raise RunError(what, where="--launcher ray", fix="Run the same command with --resume.") from None


def _ray_worker(settings: dict[str, Any]) -> int:
    os.environ[LAUNCHED] = "1"
    with suppress(OSError):  # a machine without it finds what is named from the root
        os.chdir(settings["directory"])
    try:
        return int(settings["run"](settings["arguments"]))
    except SystemExit as stop:
        return int(stop.code or 0)


def _require_devices(processes: int) -> None:
    count = torch.cuda.device_count()
    if 0 < count < processes:
        fix = f"Give --processes {count}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to compute on the CPU."
        raise ConfigError(f"This machine has {count} GPUs.", where=f"--processes {processes}", fix=fix)
