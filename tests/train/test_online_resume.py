"""An online run that is killed goes on to the same bits, on the completions and rewards that it has kept."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

REWARD = """
import os, signal
from pathlib import Path

HERE = Path(__file__).parent

def even(prompts, completions):
    "The share of even tokens. Its call number n ends the process with SIGKILL if `kills` names n; calls count on."
    calls = HERE / "calls"
    number = int(calls.read_text()) + 1 if calls.exists() else 1
    calls.write_text(str(number))
    kills = HERE / "kills"
    if kills.exists() and str(number) in kills.read_text().split():
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids) for c in completions]
"""

STEPS = 5
CLOCK = re.compile(r"seconds|time/.*|sampling/tokens_per_second")


@pytest.fixture
def start(tiny_llama: Path, tmp_path: Path, commands: Any) -> Callable[..., Any]:
    """Run a recipe for five steps with a checkpoint every two, in a process that reward calls may kill."""
    rows = [{"prompt": f"Say {i}:"} for i in range(10)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, directory: str, kills: str, *settings: str, resume: bool = False) -> Any:
        place = tmp_path / directory
        place.mkdir(exist_ok=True)
        (place / "rewards.py").write_text(REWARD)
        (place / "kills").write_text(kills)
        common = [f"steps={STEPS}", "batch_size=4", "checkpoint_every=2", "sampling.max_new_tokens=8"]
        common += ["optimizer.learning_rate=0.01"]
        rewards = f'rewards=[{{name = "{place / "rewards.py"}:even", normalise = "running"}}]'
        words = [word for setting in (*common, *settings, rewards) for word in ("--set", setting)]
        data = ["--model", str(tiny_llama), "--data", str(tmp_path / "prompts.jsonl")]
        more = ["--resume"] if resume else []
        return commands.run(["train", name, *data, "--out", str(place / "run"), *words, *more])

    return run


def left(run: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics without what a clock measures, and all weights of policy and critic."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = sorted(run.glob("*.safetensors")) + sorted(run.glob("*/*.safetensors"))
    tensors = {
        f"{file.relative_to(run)} {k}": t for file in files for k, t in safetensors.torch.load_file(file).items()
    }
    return [{k: v for k, v in row.items() if not CLOCK.fullmatch(k)} for row in rows], tensors


@pytest.mark.parametrize(
    ("name", "settings", "kills"),
    [
        # Call 1 is step 1's; a checkpoint stands behind steps 2 and 4. The file counts calls of all processes.
        ("grpo", ("rollout.completions=3",), "1 4"),
        ("ppo", ("advantage.kl_target=0.5", "advantage.kl_horizon=20", "rollout.mini_batches=2"), "4 6"),
        (
            "ppo",
            ("loss.name=ppo_clip", "critic.model={model}", "critic.optimizer.learning_rate=0.01", "rollout.epochs=2"),
            "4",
        ),
        ("dapo", ("rollout.completions=2", "rollout.dynamic_sampling=2", "rollout.mini_batches=2"), "3 6"),
        ("online_dpo", ("lora.rank=2",), "5"),
        # Steps 3 and 4 are sampled, by older weights than it holds, when the checkpoint behind step 2 is written.
        ("grpo", ("rollout.completions=3", "rollout.max_staleness=2"), "1 4"),
        ("ppo", ("rollout.max_staleness=1", "rollout.mini_batches=2"), "4"),
    ],
    ids=["grpo", "ppo", "critic", "dapo", "online_dpo with lora", "two steps ahead", "ppo, one step ahead"],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    name: str,
    settings: tuple[str, ...],
    kills: str,
    start: Callable[..., Any],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    own = [setting.format(model=tiny_llama) for setting in settings]
    straight = start(name, "straight", "", *own)
    assert straight.code == 0, straight.output
    calls = int((tmp_path / "straight" / "calls").read_text())
    shutil.move(tmp_path / "straight", tmp_path / "expected")
    resume = False
    for _ in kills.split():
        killed = start(name, "straight", kills, *own, resume=resume)
        assert killed.code == -9, killed.output
        resume = True
    finished = start(name, "straight", kills, *own, resume=resume)
    assert finished.code == 0, finished.output
    rows, weights = left(tmp_path / "straight" / "run")
    expected_rows, expected = left(tmp_path / "expected" / "run")
    assert rows == expected_rows
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # No round that was scored is scored again: each kill costs the call that it interrupts.
    assert int((tmp_path / "straight" / "calls").read_text()) == calls + len(kills.split())


def test_what_was_sampled_ahead_is_used_and_not_made_again(start: Callable[..., Any], tmp_path: Path) -> None:
    """Every row that the killed process has left is still there when the run is finished, with its version."""
    killed = start("grpo", "run", "3", "rollout.max_staleness=2", "rollout.completions=2")
    assert killed.code == -9, killed.output
    before = _completions(tmp_path / "run" / "run")
    assert {step for step, _, _ in before} > {0, 1, 2}
    finished = start("grpo", "run", "3", "rollout.max_staleness=2", "rollout.completions=2", resume=True)
    assert finished.code == 0, finished.output
    after = _completions(tmp_path / "run" / "run")
    assert {place: after[place] for place in before} == before
    assert {(step, version) for (step, _, _), (version, _) in after.items()} == {(n, max(0, n - 2)) for n in range(5)}


def _completions(run: Path) -> dict[tuple[int, int, int], tuple[int, str]]:
    with closing(sqlite3.connect(run / "rollouts.sqlite")) as file:
        rows = file.execute("SELECT step, prompt, k, version, completion FROM completions").fetchall()
    return {(step, prompt, k): (version, text) for step, prompt, k, version, text in rows}
