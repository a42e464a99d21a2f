"""Every verb as a user types it, on a tiny random model: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from accord.models.tiny import save_tiny

SMALL = ("train_prompts=8", "reward_prompts=5", "heldout_prompts=6", "sampling.max_new_tokens=6", "dpo.epochs=1")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "accord", *map(str, arguments)]


def accord(*arguments: str | Path, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, input=stdin, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def quickstart(model: Path, out: Path) -> list[str]:
    settings = [part for setting in (f"model={model}", *SMALL) for part in ("--set", setting)]
    return ["quickstart", "--out", str(out), *settings]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def round_directory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("round") / "quickstart"
    said = accord(*quickstart(model, out)).stdout
    assert "SIMULATED" in said
    assert str(out / "report.html") in said
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"Count to {n}: ", "chosen": "1 2 3", "rejected": "no" * (n + 1)} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_round_leaves_its_data_its_models_and_a_report_that_says_simulated(round_directory: Path) -> None:
    report = json.loads((round_directory / "report.json").read_text())
    assert report["simulated"] is True
    assert report["comparison"]["n"] == 6
    assert report["comparison"]["kl"]["n"] == 6
    assert len((round_directory / "completions.jsonl").read_text().splitlines()) == 8 * 4
    kinds = {json.loads(row)["kind"] for row in (round_directory / "judgements.jsonl").read_text().splitlines()}
    assert kinds == {"simulated"}
    for page in ("report.html", "report.md"):
        assert "simulated" in (round_directory / page).read_text().lower()
    aligned = transformers.AutoModelForCausalLM.from_pretrained(round_directory / "dpo" / "model")
    assert aligned.config.model_type == "llama"


def test_a_finished_round_resumes_to_the_same_report_and_refuses_other_settings(
    round_directory: Path, model: Path
) -> None:
    before = json.loads((round_directory / "report.json").read_text())["comparison"]
    accord(*quickstart(model, round_directory), "--resume")
    assert json.loads((round_directory / "report.json").read_text())["comparison"] == before
    said = accord(*quickstart(model, round_directory), code=1).stderr
    assert "--resume" in said
    changed = accord(*quickstart(model, round_directory), "--resume", "--set", "dpo.loss.beta=0.3", code=1).stderr
    assert "beta" in changed


def test_a_round_that_is_interrupted_finishes_with_resume(round_directory: Path, model: Path, tmp_path: Path) -> None:
    """Ctrl-C while the reward model trains; the resumed round ends in the same numbers as the uninterrupted one."""
    out = tmp_path / "quickstart"
    process = subprocess.Popen(
        command(*quickstart(model, out)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    heard = ""
    for line in process.stderr:
        heard += line
        if "Reward model" in line:
            os.kill(process.pid, signal.SIGINT)
            break
    heard += process.stderr.read()
    assert process.wait() == 130, heard
    assert "--resume" in heard
    accord(*quickstart(model, out), "--resume")
    ours, theirs = (
        json.loads((folder / "report.json").read_text())["comparison"]["outcomes"] for folder in (out, round_directory)
    )
    assert ours == theirs


def test_train_evaluate_and_sample_on_ones_own_data(model: Path, pairs: Path, tmp_path: Path) -> None:
    accord("train", "reward", "--model", model, "--data", pairs, "--out", tmp_path / "reward")
    said = accord(
        "evaluate", "reward", "--model", tmp_path / "reward" / "model", "--data", pairs, "--out", tmp_path / "accuracy"
    ).stdout
    shown = float(next(line for line in said.splitlines() if line.startswith("accuracy ")).split()[1])
    written = json.loads((tmp_path / "accuracy" / "reward.json").read_text())
    assert shown == pytest.approx(written["accuracy"]["value"], abs=5e-4)
    assert written["accuracy"]["n"] == 12

    accord("train", "dpo", "--model", model, "--data", pairs, "--out", tmp_path / "dpo", "--lora")
    completions = tmp_path / "completions.jsonl"
    accord(
        "sample", "--model", tmp_path / "dpo" / "model", "--data", pairs, "--out", completions, "--n", "2",
        "--limit", "3", "--set", "max_new_tokens=5",
    )  # fmt: skip
    rows = [json.loads(line) for line in completions.read_text().splitlines()]
    assert len(rows) == 6
    assert all(len(row["completion"]["token_ids"]) <= 5 for row in rows)

    accord(
        "evaluate", "compare", "--model", tmp_path / "dpo" / "model", "--baseline", model, "--data", pairs, "--out",
        tmp_path / "compare", "--reward-model", tmp_path / "reward" / "model", "--set", "max_new_tokens=5",
    )  # fmt: skip
    report = json.loads((tmp_path / "compare" / "report.json").read_text())
    assert report["simulated"] is False
    assert report["comparison"]["verdicts"]["pass_rate"] == "Not measured"
    assert report["comparison"]["reward"]["n"] == 12


def test_a_model_compared_with_itself_shows_no_difference(model: Path, pairs: Path, tmp_path: Path) -> None:
    accord(
        "evaluate", "compare", "--model", model, "--baseline", model, "--data", pairs, "--out", tmp_path / "same",
        "--set", "max_new_tokens=5",
    )  # fmt: skip
    comparison = json.loads((tmp_path / "same" / "report.json").read_text())["comparison"]
    assert all(row["text_before"] == row["text_after"] for row in comparison["outcomes"])
    # The sampler's log-probabilities and the engine's agree to the rounding of bfloat16.
    assert abs(comparison["kl"]["mean"]) < 0.1


def test_chat_answers_each_line(model: Path) -> None:
    said = accord("chat", "--model", model, "--set", "max_new_tokens=4", stdin="Hello\nAgain\n\n").stdout
    assert said.count("\n") >= 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "dpo", "--model", "MODEL", "--data", "nowhere.jsonl", "--out", "OUT"], "nowhere.jsonl"),
        (["train", "dpo", "--model", "no/such-model", "--data", "PAIRS", "--out", "OUT"], "no/such-model"),
        (["train", "sft", "--model", "MODEL", "--data", "PAIRS", "--out", "OUT"], "pairs.jsonl:1"),
        (["train", "dpo", "--model", "MODEL", "--data", "PAIRS", "--out", "OUT", "--set", "loss.bta=1"], "beta"),
        (["train", "sft", "--model", "MODEL", "--data", "SUMS", "--out", "OUT", "--set", "max_tokens=4"], "sums.jsonl"),
        (["sample", "--model", "MODEL", "--data", "PAIRS", "--out", "OUT", "--n", "0"], "--n"),
        (["evaluate", "reward", "--model", "MODEL", "--data", "PAIRS", "--out", "TAKEN"], "--out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_nothing_is_written(
    arguments: list[str], expected: str, model: Path, pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n')
    places = {"SUMS": sums, "MODEL": model, "PAIRS": pairs, "OUT": tmp_path / "out", "TAKEN": tmp_path / "taken"}
    said = accord(*[places.get(argument, argument) for argument in arguments], code=1).stderr
    assert expected in said
    assert "→" in said
    assert not (tmp_path / "out").exists()
