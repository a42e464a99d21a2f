"""Online recipes on two ranks: what they sample, score and learn is what one process does."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import transformers

from accord.cli import run
from accord.models.tiny import save_tiny, tiny_model, tiny_tokenizer
from accord.sampling.remote import LoadCall, Status
from accord.sampling.serve import SampleServer
from accord.tracking import read_metrics

RANKS = Path(__file__).with_name("online_ranks.py")
SCRIPT = runpy.run_path(str(RANKS))
CLOCK = re.compile(r"seconds|time/.*|sampling/tokens_per_second")


class Server(SampleServer):
    """transformers cannot load two models at the same time in one process."""

    loading = threading.Lock()

    def load(self, call: LoadCall) -> Status:
        with self.loading:
            return super().load(call)


@pytest.fixture(scope="module")
def runs(commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process and the two ranks at the same time."""
    directory = tmp_path_factory.mktemp("ranks")
    save_tiny(directory / "model", num_hidden_layers=2)
    config = tiny_model("llama", num_hidden_layers=2).config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(directory / "reward")
    tiny_tokenizer().save_pretrained(directory / "reward")
    SCRIPT["write"](directory)
    servers = [Server(str(directory / "model"), precision="float32") for _ in range(2)]
    for world, server in enumerate(servers, 1):
        (directory / f"server{world}").write_text(server.url)
        threading.Thread(target=server.run, daemon=True).start()
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
            with (directory / "said").open("a") as said:
                said.write(output)
    finally:
        for process in running:
            process.kill()
        for server in servers:
            server.close()
    return directory


def told(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not CLOCK.fullmatch(name)} for row in read_metrics(run)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(run.glob("*.safetensors")) + sorted(run.glob("*/*.safetensors"))
    return {f"{file.relative_to(run)} {k}": t for file in files for k, t in safetensors.torch.load_file(file).items()}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", SCRIPT["CASES"])
def test_two_ranks_sample_and_train_what_one_process_does(case: str, runs: Path) -> None:
    one, two = (runs / world / case for world in "12")
    assert len(told(one)) == 3
    for mine, expected in zip(told(two), told(one), strict=True):
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert_close(tensors(two), tensors(one))
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())


def test_an_error_of_the_first_rank_ends_all_and_resume_goes_on(commands: Any, runs: Path) -> None:
    """Every reward of step 3 fails: the message comes once, steps 1 and 2 are saved, and one process makes the rest."""
    said = (runs / "said").read_text()
    assert said.count("Every reward failed") == 1
    assert "Traceback" not in said
    assert (runs / "2" / "failed" / "checkpoints" / "2").is_dir()
    finished = commands.run([*SCRIPT["command"](runs, 2, "grpo", "failed", "once"), "--resume"])
    assert finished.code == 0, finished.output
    assert_close(tensors(runs / "2" / "failed"), tensors(runs / "1" / "grpo"))


def test_the_processes_of_a_job_cannot_sample_ahead(runs: Path, tmp_path: Path, capsys: Any) -> None:
    words = SCRIPT["command"](runs, 1, "grpo")
    words[words.index("--out") + 1] = str(tmp_path / "run")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert run([*words, "--set", "rollout.max_staleness=1"]) == 1
    finally:
        dist.destroy_process_group()
    assert "sample and train in turn" in capsys.readouterr().err
