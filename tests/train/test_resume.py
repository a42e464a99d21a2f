"""A run that is killed, stopped, or meets a full disk goes on to the same bits."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from accord.cli import run

TEMPORARY = re.compile(r"\.[0-9a-f]{12}")


@pytest.mark.parametrize(
    ("kind", "more", "kills"),
    [
        # A checkpoint stands behind steps 5 and 10; the last kill comes while or after the model is written.
        ("sft", (), (1, 5, 7, 12)),
        ("sft", ("--lora",), (2, 8)),
        ("dpo", (), (3, 6, 11)),
        ("reward", (), (10,)),
        ("reward", ("--lora",), (4,)),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str,
    more: tuple[str, ...],
    kills: tuple[int, ...],
    commands: Any,
    arguments: Any,
    straight: Any,
    assert_same_run: Any,
    tmp_path: Path,
) -> None:
    """Killed with SIGKILL as soon as metrics.jsonl shows the step, resumed, killed again …"""
    out = tmp_path / "run"
    resume: tuple[str, ...] = ()
    for step in kills:
        killed = commands.run(
            arguments(kind, out, *more, *resume), metrics=out / "metrics.jsonl", lines=step, signal=signal.SIGKILL
        )
        assert killed.code in (-signal.SIGKILL, 0), killed.output
        resume = ("--resume",)
    finished = commands.run(arguments(kind, out, *more, *resume))
    assert finished.code == 0, finished.output
    assert_same_run(out, straight(kind, *more))


def test_training_learns(straight: Any) -> None:
    """12 steps lower every loss: else equal bits would mean little."""
    for kind in ("sft", "dpo", "reward"):
        losses = [json.loads(line)["loss"] for line in (straight(kind) / "metrics.jsonl").read_text().splitlines()]
        assert losses[-1] < losses[0] - 0.02, kind


@pytest.mark.parametrize(("kind", "step"), [("sft", 1), ("dpo", 7)])
def test_ctrl_c_leaves_a_run_that_resume_finishes(
    kind: str, step: int, commands: Any, arguments: Any, straight: Any, assert_same_run: Any, tmp_path: Path
) -> None:
    """The running step is finished and saved; the command to go on is printed; no traceback."""
    out = tmp_path / "run"
    stopped = commands.run(arguments(kind, out), metrics=out / "metrics.jsonl", lines=step, signal=signal.SIGINT)
    assert stopped.code == 130, stopped.output
    assert "Traceback" not in stopped.output
    assert f"accord train {kind}" in stopped.output
    assert stopped.output.rstrip().endswith("--resume")
    last = len((out / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(last)]
    assert not (out / "model").exists()
    finished = commands.run(arguments(kind, out, "--resume"))
    assert finished.code == 0, finished.output
    assert_same_run(out, straight(kind))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    commands: Any, arguments: Any, straight: Any, assert_same_run: Any, tmp_path: Path
) -> None:
    assert commands.run(arguments("sft", tmp_path / "again", "--lora")).code == 0
    assert_same_run(tmp_path / "again", straight("sft", "--lora"))
    assert commands.run(arguments("sft", tmp_path / "other", "--lora", "--set", "seed=1")).code == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "other", straight("sft", "--lora"))


def test_a_disk_that_fills_up_at_any_write_loses_nothing(
    arguments: Any,
    straight: Any,
    assert_same_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every file is flushed before it counts, so the n-th flush stands for the n-th write of the run.

    The disk fills up at several of them in turn; then there is one message and no traceback, nothing half-written,
    and after space was made the run goes on to the same bits.
    """
    flush, calls, full_at = os.fsync, 0, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "clean"
    assert run(arguments("sft", out)) == 0
    assert_same_run(out, straight("sft"))
    total = calls
    assert total > 20
    capsys.readouterr()
    for full_at in sorted({1, 3, 5, *range(6, total, total // 7), total - 1}):
        calls, out = 0, tmp_path / f"full-{full_at}"
        code = run(arguments("sft", out))
        message = capsys.readouterr().err
        assert code == 1, f"flush {full_at} of {total}: {message}"
        assert "The disk is full" in message
        assert "--resume" in message
        assert not [p for p in out.rglob(".*") if TEMPORARY.search(p.name)], "something temporary was left"
        calls = total + 1
        assert run(arguments("sft", out, "--resume")) == 0, capsys.readouterr().err
        assert_same_run(out, straight("sft"))
        capsys.readouterr()
