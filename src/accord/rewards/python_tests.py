"""`python_tests`: the completion's Python passes the prompt's unit tests, run in a process of its own.

What confines that process (`accord.rewards.confine`), each where the system has it:

- everywhere: limits of CPU seconds, memory, size of files and number of open files, a wall clock after which its
  process group is killed, an empty working directory that is removed, no environment, Python's isolated mode without
  installed packages, and an audit hook that refuses sockets, other programs and processes, signals, ctypes, and changes
  to files outside the working directory. It may start no process and no thread (a limit that root is exempt from).
- Linux: user and network name spaces of its own, where the kernel allows them to everyone.
- Linux 5.13 and later: Landlock; nothing outside the working directory can be written, made or removed.
- Linux on x86-64 and arm64: seccomp; no sockets, no processes, no other programs, no signals.

It protects the machine from what models write by accident and from simple attacks. It is no virtual machine: files that
the user may read can be read (there is no way to send them anywhere), the working directory may fill its disk while the
CPU seconds last, and the kernel is shared. Without Landlock and seccomp, code that knows CPython's internals can get
round the audit hook. And the code shares a process with the tests: a program that sets out to fool them can.
Run jobs whose data you do not trust in a container or a virtual machine as well.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from accord.rewards import confine
from accord.rewards.base import (
    REWARDS,
    Failed,
    Outcome,
    RewardConfig,
    RewardFunction,
    RewardKind,
    concurrently,
    reason_of,
)
from accord.types import Completion, Prompt

__all__ = ["PythonTestsConfig", "code_of", "program_of", "python_tests", "run_shown", "run_tests"]

_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_REPORT = 1 << 20
"""Bytes of the report that are read."""


class PythonTestsConfig(RewardConfig):
    """Settings of `python_tests`."""

    partial: bool = True
    """The reward is the share of tests that pass; if false, 1 where all do and else 0."""
    cpu_seconds: int = Field(2, ge=1)
    """CPU time of one completion's program and its tests."""
    timeout: float = Field(20.0, gt=0, allow_inf_nan=False)
    """Wall-clock seconds of one completion; then the reward is None, because the machine may have been busy."""
    memory_mb: int = Field(256, ge=64)
    """Address space of the process."""
    file_mb: int = Field(1, ge=0)
    """Size of each file that it writes."""
    concurrency: int = Field(4, ge=1)
    """How many completions are tested at once."""


def python_tests(config: PythonTestsConfig, _tokenizer: Any) -> RewardFunction:
    """The share of unit tests that the completion's last code block (without one: its whole text) passes.

    It is run behind a plain prompt with which it is Python.

    A statement of the tests is a test unless it is an import, a definition or an assignment; it passes if it raises
    nothing. What the program does is its result: an exception, an endless loop or too much memory fails the test in
    which it happens and, if the process ends, those that follow. What the machine does is a failure: no process, or no
    end within `timeout`.
    """

    def one(pair: tuple[Prompt, Completion]) -> Outcome:
        prompt, completion = pair
        if not (prompt.answer or "").strip():
            return Failed("the prompt has no tests")
        try:
            total = sum(is_test for _, is_test in confine.statements(prompt.answer or ""))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return Failed(f"the tests are not Python: {error}")
        if total == 0:
            return Failed("the prompt's tests test nothing")
        try:
            before, code = program_of(prompt, completion.text)
            passed = run_tests(before, code, prompt.answer or "", config)
        except Exception as error:
            return Failed(reason_of(error))
        passed = min(passed, total)
        return passed / total if config.partial else float(passed == total)

    def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Outcome]:
        return concurrently(one, list(zip(prompts, completions, strict=True)), config.concurrency)

    return reward


def code_of(text: str) -> str:
    """The last fenced code block, closed or not; without one the whole text."""
    blocks: list[str] = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def program_of(prompt: Prompt, text: str) -> tuple[str, str]:
    """What may stand before a completion's code, and the code.

    A plain prompt is Python where the completion goes on with it (HumanEval), or needs its imports. Whether it is shows
    in the process of the tests.
    """
    code = code_of(text)
    if not isinstance(prompt.content, str):
        return "", code
    return prompt.content if code == text else f"{prompt.content}\n", code


def run_tests(before: str, code: str, tests: str, config: PythonTestsConfig) -> int:
    """How many of the tests pass.

    Args:
        before: what the code goes on with, if the two are Python together.

    Raises:
        TimeoutError: it did not end in time.
        OSError: no process could be started.
    """
    token = secrets.token_hex(16)
    report, _ = _confined({"before": before, "code": code, "tests": tests, "token": token}, config)
    return sum(f"{token} " in line for line in set(report.splitlines()))


def run_shown(code: str, config: PythonTestsConfig) -> str:
    """What a program prints, and the value of its last statement where that is an expression; or its exception.

    Raises:
        ValueError: it was stopped at a limit; the message says so.
        TimeoutError: it did not end in time.
        OSError: no process could be started.
    """
    report, status = _confined({"code": code}, config)
    if status:
        raise ValueError(f"{report}\nstopped at its limit of {config.cpu_seconds} CPU seconds or memory".strip())
    return report.strip()


def _confined(task: Mapping[str, str], config: PythonTestsConfig) -> tuple[str, int]:
    """What `accord.rewards.confine` writes in a process of its own, how that ended; all it started is killed."""
    limits = config.model_dump(include={"cpu_seconds", "memory_mb", "file_mb"})
    with (
        tempfile.TemporaryDirectory(prefix="accord-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as report,
    ):
        given.write(json.dumps({**task, "limits": limits}).encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(confine.__file__))],
            stdin=given,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={},
            start_new_session=True,
        )
        try:
            process.wait(config.timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        return report.read(_REPORT).decode(errors="replace"), process.returncode


REWARDS.add("python_tests", RewardKind(PythonTestsConfig, python_tests, needs="answer", waits=True))
