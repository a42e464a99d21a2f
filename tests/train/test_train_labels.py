"""`accord train kto|bco|apo_zero_unpaired` as a user types it: it learns, says what it did, and resumes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from accord.data.load import load
from accord.data.usable import unusable
from accord.errors import RowError
from accord.types import LabelledCompletion, Ranking

COLOURS = ["red", "green", "blue", "black"]


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of 16 prompts: the colour is good, something else bad; every other prompt has both."""
    rows = []
    for i in range(16):
        prompt = f"Say {COLOURS[i % 4]}, {i} times:"
        rows.append({"prompt": prompt, "completion": f" {COLOURS[i % 4]}", "label": True})
        if i % 2:
            rows.append({"prompt": prompt, "completion": " no, never", "label": False})
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["kto", "bco", "apo_zero_unpaired"])
def test_training_lowers_the_loss_and_widens_the_margin(
    recipe: str, commands: Any, tiny_llama: Path, labels: Path, tmp_path: Path
) -> None:
    """Every step is the whole data set, so the first loss is that of policy = reference: ½, or log 2 for BCO."""
    command = ["train", recipe, "--model", str(tiny_llama), "--data", str(labels), "--out", str(tmp_path / "run")]
    settings = ["epochs=12", "optimizer.learning_rate=0.003", "engine.precision=float32"]
    finished = commands.run([*command, *(word for setting in settings for word in ("--set", setting))])
    assert finished.code == 0, finished.output
    assert "24 records from 24 rows\n" in finished.output
    assert "16 good and 8 bad completions weigh 2 : 1." in finished.output
    assert "--set loss.undesirable_weight=1.71" in finished.output
    found = metrics(tmp_path / "run")
    assert len(found) == 12
    assert found[0]["loss"] == pytest.approx(0.6931 if recipe == "bco" else 0.5, abs=1e-4)
    assert found[-1]["loss"] < found[0]["loss"] - 0.02
    assert found[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert found[-1]["rewards/margins"] > 0.1
    assert all("kl" in row for row in found) is (recipe == "kto")


def test_a_killed_run_resumes_to_the_same_bits(commands: Any, tiny_llama: Path, labels: Path, tmp_path: Path) -> None:
    """16 prompts in steps of 4, 3 epochs: 12 steps, killed after 7, gone on from the checkpoint of step 5."""

    def command(out: str, *more: str) -> list[str]:
        settings = ["batch_size=4", "epochs=3", "checkpoint_every=5", "optimizer.learning_rate=0.003"]
        words = ["train", "kto", "--model", str(tiny_llama), "--data", str(labels), "--out", str(tmp_path / out)]
        return [*words, *(word for setting in settings for word in ("--set", setting)), *more]

    straight = commands.run(command("straight"))
    assert straight.code == 0, straight.output
    killed = commands.run(
        command("killed"), metrics=tmp_path / "killed" / "metrics.jsonl", lines=7, signal=signal.SIGKILL
    )
    assert killed.code == -signal.SIGKILL
    resumed = commands.run(command("killed", "--resume"))
    assert resumed.code == 0, resumed.output

    def told(out: str) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(tmp_path / out)]

    assert [row["step"] for row in told("straight")] == list(range(1, 13))
    assert told("killed") == told("straight")
    (one,), (other,) = (list((tmp_path / out / "model").glob("*.safetensors")) for out in ("killed", "straight"))
    assert one.read_bytes() == other.read_bytes()


def test_pairs_serve_as_labels_and_the_command_says_so(
    commands: Any, tiny_llama: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    command = ["train", "bco", "--model", str(tiny_llama), "--data", str(data["dpo"]), "--out", str(tmp_path / "run")]
    finished = commands.run([*command, "--set", "max_steps=1"])
    assert finished.code == 0, finished.output
    assert "of 24 pairs the chosen completion counts as good, the rejected one as bad" in finished.output
    assert "24 good and 24 bad completions weigh 1 : 1." in finished.output


def test_one_prompt_alone_is_refused_by_kto(commands: Any, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    command = ["train", "kto", "--model", str(tiny_llama), "--data", str(path), "--out", str(tmp_path / "run")]
    finished = commands.run(command)
    assert finished.code == 1
    assert "same prompt" in finished.output
    assert "Traceback" not in finished.output


def test_labels_of_a_file(tmp_path: Path) -> None:
    """Own labels as they are, a pair as two; with both in a row, its own; a ranking is refused with a way out."""
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"prompt": "p", "completion": "a", "label": False},
        {"prompt": "q", "chosen": "b", "rejected": "c"},
        {"prompt": "r", "completion": "d", "label": True, "chosen": "e", "rejected": "f"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(str(path), "labels")
    told = [(record.prompt, record.completion, record.label, str(record.source)) for record in loaded.records]
    assert told == [
        ("p", "a", False, f"{path}:1"),
        ("q", "b", True, f"{path}:2"),
        ("q", "c", False, f"{path}:2"),
        ("r", "d", True, f"{path}:3"),
    ]
    assert all(isinstance(record, LabelledCompletion) for record in loaded.records)
    assert loaded.converted == 1
    path.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1]}) + "\n")
    with pytest.raises(RowError, match="which is good: write prompt, completion and label"):
        load(str(path), "labels")
    assert "prompt, completion and label" in unusable(Ranking("p", ("a", "b"), (0, 1)), "labels").fix
