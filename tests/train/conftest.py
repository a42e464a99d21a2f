"""`accord train …` in processes of its own that can be killed, and tiny models and data to train on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from accord.models.tiny import save_tiny

# Threads cost more than they bring where the models are tiny, most of all when tests run on every core.
torch.set_num_threads(1)

# Importing torch, transformers and peft takes seconds, so one process does it once and forks a child per command. It
# runs no tensor operation itself: there are no threads yet that a fork would lose.
SERVER = """
import json, os, signal, sys
import peft, torch
import accord.cli.train, accord.data.load, accord.models.load, accord.models.render, accord.train, accord.tracking
from accord.cli import run
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 99
        try:
            code = run(job["arguments"])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Finished:
    """How a command ended: exit code (negative: the signal), and everything that it printed."""

    code: int
    output: str


class Commands:
    """Runs `accord` commands, one at a time."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "output.txt"
        environment = {
            **os.environ,
            "ACCORD_CACHE": str(directory / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=directory,
        )

    def run(
        self, arguments: Sequence[str], *, metrics: Path | None = None, lines: int = 0, signal: int = 0
    ) -> Finished:
        """Run a command; once `metrics` has this many lines, send it `signal`."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({"arguments": list(arguments), "log": str(self.log)}) + "\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        if metrics is not None:
            give_up = time.monotonic() + 60
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
                assert time.monotonic() < give_up, self.log.read_text()
                time.sleep(0.001)
            os.kill(child, signal)
        return Finished(int(self.server.stdout.readline()), self.log.read_text())


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("commands"))
    yield running
    assert running.server.stdin is not None
    running.server.stdin.close()
    running.server.wait(timeout=30)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """24 rows of demonstrations ("sft") and of pairs ("dpo", "reward")."""
    directory = tmp_path_factory.mktemp("data")
    words = ["red", "green", "blue", "black", "white", "grey"]
    pairs = [
        {
            "prompt": f"Say {words[i % 6]} {i % 4 + 1} times:",
            "chosen": f" {words[i % 6]}" * (i % 4 + 1),
            "rejected": f" {words[(i + 1) % 6]}" * (i % 3 + 1),
        }
        for i in range(24)
    ]
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    files = {"sft": demonstrations, "dpo": pairs, "reward": pairs}
    for name, rows in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: directory / f"{name}.jsonl" for name in files}


@pytest.fixture(scope="session")
def arguments(tiny_llama: Path, data: dict[str, Path]) -> Callable[..., list[str]]:
    """The command of a run of 12 steps (2 epochs of 6) with a checkpoint every 5."""

    def make(kind: str, out: Path, *more: str, model: Path = tiny_llama, rows: Path | None = None) -> list[str]:
        settings = ["batch_size=4", "epochs=2", "checkpoint_every=5", "optimizer.learning_rate=0.003", "samples=0"]
        command = ["train", kind, "--model", str(model), "--data", str(rows or data[kind]), "--out", str(out)]
        return [*command, *(word for setting in settings for word in ("--set", setting)), *more]

    return make


def weights(run: Path) -> dict[str, Any]:
    (file,) = (run / "model").glob("*.safetensors")
    return safetensors.torch.load_file(file)


def rows(run: Path) -> list[dict[str, float]]:
    """The metrics without what a clock measures."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[..., None]:
    """Weights equal bit for bit; metrics equal, and each step exactly once; no checkpoint and no other file left."""

    def check(run: Path, expected: Path, *files: str) -> None:
        assert [row["step"] for row in rows(run)] == list(range(1, 13))
        assert rows(run) == rows(expected)
        ours, theirs = weights(run), weights(expected)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        left = sorted(path.name for path in run.iterdir() if not path.name.startswith("."))
        assert left == sorted(["config.toml", "metrics.jsonl", "model", "provenance.json", *files])

    return check


@pytest.fixture(scope="session")
def straight(commands: Commands, arguments: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same run without any interruption, made once per kind."""
    made: dict[tuple[str, ...], Path] = {}

    def make(kind: str, *more: str) -> Path:
        key = kind, *more
        if key not in made:
            made[key] = tmp_path_factory.mktemp("straight") / "run"
            finished = commands.run(arguments(kind, made[key], *more))
            assert finished.code == 0, finished.output
        return made[key]

    return make
