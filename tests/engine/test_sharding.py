"""A job of two ranks computes what one process computes; a checkpoint of either goes on in the other.

The ranks are real processes (gloo); `ranks.py` is what they run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accord.engine.distributed import share

RANKS = Path(__file__).with_name("ranks.py")
EXACT = ["sft", "sft-untied", "sft-lora", "sft-zero2", "reward", "reward-lora", "dpo", "dpo-lora", "coupled", "ppo"]
RESUMED = ["sft", "reward-lora", "dpo-lora", "coupled"]


def start(world: int, command: Sequence[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and error output of every rank; with `world=1` of a plain process."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    running = []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if world > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            environment |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "localhost"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([sys.executable, *command], env=environment, **pipes))
    ended = []
    for process in running:
        try:
            output, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            for other in running:
                other.kill()
            raise
        ended.append((process.returncode, output, errors))
    return ended


@pytest.fixture(scope="module")
def came_out(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """`came_out("2-sft")`: weights, metrics and a forward pass of a case on so many ranks; `"1-to-2-sft"`: resumed."""
    directory = tmp_path_factory.mktemp("ranks")
    for world, verbs in [(1, ["models", "train"]), (2, ["train", "resume"]), (1, ["resume"])]:
        for code, _, errors in start(world, [str(RANKS), str(directory), *verbs]):
            assert code == 0, f"{verbs} on {world}: {errors}"
    return lambda name: torch.load(directory / f"{name}.pt")


def assert_close(found: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=0, atol=atol, msg=name)
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=100 * atol)
    for tree, other in zip(found["said"], expected["said"], strict=True):
        torch.testing.assert_close(tree, other, rtol=1e-4, atol=100 * atol)


@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_learn_what_one_process_learns(case: str, came_out: Any) -> None:
    """Ten steps with clipping and weight decay, cut trees, several micro-batches, and steps with an idle rank."""
    assert_close(came_out(f"2-{case}"), came_out(f"1-{case}"), atol=1e-5)


def test_bfloat16_differs_by_its_rounding_only(came_out: Any) -> None:
    """Weights that travel in bfloat16 are those that autocast would round: the first loss is the same."""
    two, one = came_out("2-sft-bfloat16"), came_out("1-sft-bfloat16")
    assert two["rows"][0]["loss"] == pytest.approx(one["rows"][0]["loss"], rel=1e-3)
    assert two["rows"][-1]["loss"] == pytest.approx(one["rows"][-1]["loss"], rel=2e-2)


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_goes_on_on_as_many_ranks_to_the_same_bits(case: str, came_out: Any) -> None:
    for world in (1, 2):
        resumed, straight = came_out(f"{world}-to-{world}-{case}"), came_out(f"{world}-{case}")
        assert resumed["rows"] == straight["rows"][5:]


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("worlds", ["1-to-2", "2-to-1"])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(worlds: str, case: str, came_out: Any) -> None:
    resumed, straight = came_out(f"{worlds}-{case}"), came_out(f"1-{case}")
    for row, other in zip(resumed["rows"], straight["rows"][5:], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-3)
    for name, tensor in came_out(f"{worlds[-1]}-to-{worlds[-1]}-{case}")["state"].items():
        torch.testing.assert_close(resumed["state"][name], tensor, rtol=0, atol=1e-5, msg=name)


FAILING = """
import sys
from accord.engine.distributed import gather, process_group, rank
from accord.errors import RunError
from accord.cli import _fail
try:
    with process_group():
        print("rank", rank())
        if rank() == {rank}:
            {failure}
        gather(None)
except RunError as error:
    sys.exit(_fail(str(error)))
"""


def test_an_error_of_one_rank_is_one_message_and_ends_all() -> None:
    ended = start(2, ["-c", FAILING.format(rank=1, failure='raise RunError("The disk is full.")')])
    assert [code for code, _, _ in ended] == [1, 1]
    errors = "".join(errors for _, _, errors in ended)
    assert errors.count("The disk is full.") == 1
    assert "Traceback" not in errors
    assert [output for _, output, _ in ended] == ["rank 0\n", ""], "only rank 0 writes to standard output"


def test_a_lost_rank_is_one_message() -> None:
    ended = start(2, ["-c", FAILING.format(rank=1, failure="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")])
    assert [code for code, _, _ in ended] == [1, -9]
    assert ended[0][2].startswith("Another process of this job has ended")
    assert "--resume" in ended[0][2]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_shares_are_disjoint_whole_and_balanced(sizes: list[int], ranks: int) -> None:
    """Largest first to the least loaded: no two loads differ by more than the largest item."""
    shares = share(sizes, ranks)
    assert sorted(index for mine in shares for index in mine) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
