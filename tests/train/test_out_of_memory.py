"""A run that memory is too small for ends in one message that says what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accord.cli import run
from accord.errors import ResourceError
from accord.losses import LOSSES
from accord.losses.records import BoundLoss, Loss, LossOutput, TokenLogprobs
from accord.losses.sft import SFTConfig

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB.\nSee documentation."


def raises(error: Exception) -> Callable[..., LossOutput]:
    def loss(inputs: TokenLogprobs, config: SFTConfig) -> LossOutput:  # noqa: ARG001
        raise error

    return loss


def greedy(inputs: TokenLogprobs, config: SFTConfig) -> LossOutput:  # noqa: ARG001
    """A petabyte: the CPU's own allocator refuses it."""
    return LossOutput(inputs.logprobs_N.new_empty(1 << 48)[: len(inputs.logprobs_N)])


@pytest.fixture
def train_by(
    tiny_llama: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[..., LossOutput]], int]:
    """`accord train` in this process, whose loss is the given function."""

    def start(function: Callable[..., LossOutput]) -> int:
        bound = BoundLoss(Loss(function, SFTConfig, TokenLogprobs), SFTConfig())
        monkeypatch.setattr("accord.train.offline.bind_loss", lambda _: bound)
        words = ["train", "sft", "--model", str(tiny_llama), "--data", str(data["sft"]), "--set", "samples=0"]
        return run([*words, "--out", str(tmp_path / "run")])

    return start


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (greedy, "Memory ran out: 1125899906842624 bytes more were asked for."),
        (raises(torch.OutOfMemoryError(CUDA)), "Memory ran out: 2.50 GiB more were asked for."),
        (raises(MemoryError()), "Memory ran out."),
    ],
    ids=["CPU", "CUDA", "Python"],
)
def test_too_little_memory_is_a_message_with_ways_out(
    function: Any, message: str, train_by: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_by(function) == 1
    said = capsys.readouterr().err
    assert said.count("Memory ran out") == 1
    assert message in said
    for way in ("accord plan", "engine.micro_batch_tokens=128", "engine.activation_checkpointing=on", "--lora"):
        assert way in said
    assert "Traceback" not in said


def test_other_errors_stay_what_they_are(train_by: Any) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        train_by(raises(RuntimeError("shapes do not match")))
    assert not isinstance(caught.value, ResourceError)
    assert "sft" in LOSSES
