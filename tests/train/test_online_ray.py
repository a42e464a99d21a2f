"""Online training with samplers and rewards in actors of a local Ray cluster, of which some are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

from accord.tracking import read_metrics

REWARD = """
import os, signal
from pathlib import Path

def even(prompts, completions):
    "The share of even tokens. The first process that scores a second batch is killed while it does."
    log = Path(__file__).with_name("scored")
    mine = f"{os.getpid()}\\n"
    again = log.exists() and mine in log.read_text()
    with log.open("a") as file:
        file.write(mine)
    killed = Path(__file__).with_name("killed")
    if again and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids) for c in completions]
"""

SETTINGS = [
    "steps=8", "batch_size=4", "checkpoint_every=3", "samples=0", "engine.precision=float32", "optimizer.epsilon=1e-5",
    "optimizer.learning_rate=0.003", "sampling.max_new_tokens=8", "rollout.completions=4",
]  # fmt: skip


def start(arguments: list[str], cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "ACCORD_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"COLUMNS": "200", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    command = [sys.executable, "-m", "accord", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_sampler(job: subprocess.Popen[str], metrics: Path, lines: int) -> None:
    """Kill one of the actors that sample, once so many steps are logged."""
    give_up = time.monotonic() + 400  # a cluster starts slowly on a busy machine
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < give_up
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)
    children = psutil.Process(job.pid).children(recursive=True)
    samplers = [child for child in children if "ray::_ServerActor" in " ".join(child.cmdline())]
    assert len(samplers) == 2
    samplers[0].send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: ray)")
def test_lost_samplers_and_reward_workers_are_replaced(commands: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """One process trains, two sample, one scores: what is kept and what is learned are those of a process alone."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}:"}) + "\n" for i in range(10)))
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    data = ["--model", str(tiny_llama), "--data", str(tmp_path / "prompts.jsonl")]
    for name in ("alone", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rewards.py").write_text(REWARD)

    def command(name: str) -> list[str]:
        rewards = ["--reward", f"{tmp_path / name / 'rewards.py'}:even", "--out", str(tmp_path / name / "run")]
        return ["train", "grpo", *data, *rewards, *words]

    (tmp_path / "alone" / "killed").touch()
    straight = commands.run(command("alone"))
    assert straight.code == 0, straight.output
    more = ["--processes", "1", "--launcher", "ray", "--set", "workers.samplers=2", "--set", "workers.rewards=1"]
    job = start([*command("cluster"), *more], tmp_path / "cache")
    try:
        kill_sampler(job, tmp_path / "cluster" / "run" / "metrics.jsonl", 4)
        output, _ = job.communicate(timeout=240)
    finally:
        job.kill()
    assert job.returncode == 0, output
    assert "A sampler is looked for anew" in output
    scored = (tmp_path / "cluster" / "scored").read_text().split()
    assert len(set(scored)) == 2
    assert len(scored) == 9  # eight steps, and the batch that the killed process had
    ours, theirs = (tmp_path / name / "run" for name in ("cluster", "alone"))
    assert [row["step"] for row in read_metrics(ours)] == list(range(1, 9))
    assert sampled(ours) == sampled(theirs)
    expected = safetensors.torch.load_file(theirs / "model" / "model.safetensors")
    for name, tensor in safetensors.torch.load_file(ours / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
    assert not (ours / "exchange").exists()


def sampled(run: Path) -> list[tuple[Any, ...]]:
    """Step, prompt, k, version of the weights and tokens of every completion that is kept."""
    query = (
        "SELECT step, prompt, k, version, json_extract(completion, '$.token_ids') FROM completions "
        "ORDER BY step, prompt, k"
    )
    with closing(sqlite3.connect(run / "rollouts.sqlite")) as file:
        return file.execute(query).fetchall()


def test_workers_need_a_cluster(commands: Any, tiny_llama: Path, tmp_path: Path) -> None:
    data = ["--model", str(tiny_llama), "--data", str(tmp_path / "prompts.jsonl"), "--reward", "length"]
    finished = commands.run(["train", "grpo", *data, "--out", str(tmp_path / "run"), "--set", "workers.rewards=1"])
    assert finished.code == 1
    assert "There is no Ray cluster" in finished.output
    assert "Traceback" not in finished.output
