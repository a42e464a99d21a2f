"""A job of two ranks trains what one process trains: with control branches, with validation, on rows that stream.

The ranks are real processes (gloo) that run the command; `train_ranks.py` says on what.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from accord.models.tiny import save_tiny
from accord.tracking import read_metrics

RANKS = Path(__file__).with_name("train_ranks.py")
SCRIPT = runpy.run_path(str(RANKS))


@pytest.fixture(scope="module")
def runs(commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process and the two ranks at the same time. What streams to the ranks, the one process has in memory."""
    directory = tmp_path_factory.mktemp("ranks")
    save_tiny(directory / "model", num_hidden_layers=2)
    SCRIPT["write"](directory)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    job = {"WORLD_SIZE": 2, "MASTER_PORT": port, "MASTER_ADDR": "localhost", "ACCORD_CACHE": directory / "cache"}
    running = []
    for rank in range(2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **job}.items()}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen([sys.executable, str(RANKS), str(directory)], env=environment, **pipes))
    try:
        for name in SCRIPT["CASES"]:
            alone = commands.run(SCRIPT["command"](directory, 1, name))
            assert alone.code == 0, alone.output
        for process in running:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()
    return directory


def told(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(run)]


@pytest.mark.parametrize("case", SCRIPT["CASES"])
def test_two_ranks_train_what_one_process_trains(case: str, runs: Path) -> None:
    one, two = (runs / world / case for world in "12")
    assert len(told(one)) >= 6
    for mine, expected in zip(told(two), told(one), strict=True):
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-4)
    ours, theirs = (safetensors.torch.load_file(run / "model" / "model.safetensors") for run in (two, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_the_cases_are_what_they_say(runs: Path) -> None:
    """KTO measures its drift, validation stops early and keeps step 2, and rows stream to the ranks alone."""
    assert all("kl" in row for row in told(runs / "2" / "kto"))
    losses = [row["validation/loss"] for row in told(runs / "2" / "validation") if "validation/loss" in row]
    assert len(losses) == 3
    assert losses == sorted(losses)
    assert len(list((runs / "cache" / "tokens").glob("*/trees.sqlite"))) == 2
    for case in SCRIPT["CASES"]:
        left = sorted(path.name for path in (runs / "2" / case).iterdir())
        assert left == ["config.toml", "metrics.jsonl", "model", "provenance.json"]
