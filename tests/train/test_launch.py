"""`accord train … --processes 2` and `--launcher ray`: the run of one process, also when a process is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

FLOAT32 = ("--set", "engine.precision=float32")


class Job:
    """`accord ARGUMENTS` in a process of its own, with those that it starts."""

    def __init__(self, arguments: Sequence[str], cache: Path, directory: Path | None = None) -> None:
        environment = {**os.environ, "ACCORD_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"COLUMNS": "200", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        command = [sys.executable, "-m", "accord", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment, cwd=directory, **pipes)

    def kill_worker(self, metrics: Path, lines: int, words: Sequence[str]) -> None:
        """Kill the last of the started processes whose command line holds `words`, once so many steps are logged."""
        give_up = time.monotonic() + 400  # a cluster starts slowly on a busy machine
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < give_up
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)
        children = psutil.Process(self.process.pid).children(recursive=True)
        workers = [child for child in children if all(word in " ".join(child.cmdline()) for word in words)]
        workers[-1].send_signal(signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=240)
        finally:
            self.process.kill()
        return self.process.returncode, output


def assert_same_model(run: Path, expected: Path) -> None:
    ours, theirs = (safetensors.torch.load_file(place / "model" / "model.safetensors") for place in (run, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=name)
    steps = [line.split(b",")[0] for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert steps == [f'{{"step": {step}'.encode() for step in range(1, 13)]
    assert not (run / "checkpoints").exists()


def test_a_killed_process_ends_the_job_and_resume_finishes_it(arguments: Any, straight: Any, tmp_path: Path) -> None:
    """DPO, whose reference is computed by all ranks; a checkpoint stands behind step 5, the kill comes after step 6."""
    command = arguments("dpo", tmp_path / "run", *FLOAT32, "--processes", "2")
    job = Job(command, tmp_path / "cache")
    job.kill_worker(tmp_path / "run" / "metrics.jsonl", 6, ["-m accord train dpo"])
    code, output = job.end()
    assert code == 1, output
    assert output.count("of 2 was killed (SIGKILL)") == 1
    assert "--resume" in output
    assert "Traceback" not in output
    code, output = Job([*command, "--resume"], tmp_path / "cache").end()
    assert code == 0, output
    assert_same_model(tmp_path / "run", straight("dpo", *FLOAT32))


def test_an_error_of_all_processes_is_said_once(arguments: Any, tmp_path: Path) -> None:
    command = arguments("sft", tmp_path / "run", "--processes", "2", "--set", "engine.sharding.cpu_offload=true")
    code, output = Job(command, tmp_path / "cache").end()
    assert code == 1, output
    assert output.count("Everything is in the host's memory already.") == 1
    assert "Traceback" not in output


def test_settings_that_need_processes_are_refused_without(commands: Any, arguments: Any, tmp_path: Path) -> None:
    for more, message in [
        (("--set", 'engine.sharding.strategy="grad"'), "no processes to share the model"),
        (("--launcher", "ray"), "How many workers?"),
        (("--processes", "0"), "no job of no process"),
    ]:
        finished = commands.run(arguments("sft", tmp_path / "run", *more))
        assert (finished.code, message in finished.output) == (1, True), finished.output


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: ray)")
def test_ray_restarts_a_job_that_lost_a_worker(
    arguments: Any, straight: Any, data: dict[str, Path], tmp_path: Path
) -> None:
    """The data is named from the working directory, which Ray's workers do not share by themselves."""
    toml = tmp_path / "data.toml"
    toml.write_text(f'[data]\n"{data["sft"].name}" = 1.0\n')
    command = arguments("sft", tmp_path / "run", *FLOAT32, "--processes", "2", "--launcher", "ray")
    at = command.index("--data")
    command[at : at + 2] = ["--config", str(toml)]
    job = Job(command, tmp_path / "cache", data["sft"].parent)
    job.kill_worker(tmp_path / "run" / "metrics.jsonl", 6, ["RayTrainWorker"])
    code, output = job.end()
    assert code == 0, output
    assert_same_model(tmp_path / "run", straight("sft", *FLOAT32))
