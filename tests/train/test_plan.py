"""What a plan says of the data is counted by hand; what it advises makes the run smaller; it writes nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord.cli import run
from accord.errors import ConfigError
from accord.models.load import load_policy, load_reward_model
from accord.models.tiny import save_tiny
from accord.models.trees import Branch, Tree
from accord.train import plan, resolve
from accord.train.plan import make_plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("plan") / "model", "llama")


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    """Ten pairs; prompt k has 4 + k tokens, its completions 10 and 20, of which all carry loss."""
    rng = np.random.default_rng(0)

    def branch(length: int) -> Branch:
        return Branch(rng.integers(3, 250, length), np.ones(length, bool))

    return [Tree(rng.integers(3, 250, 4 + k), (branch(10), branch(20)), ranks=(0, 1)) for k in range(10)]


def test_the_data_is_described_as_it_is(model: Path, trees: list[Tree]) -> None:
    made = make_plan(load_policy(str(model)), trees, resolve("dpo", None, ["batch_size=5", "epochs=3"]))
    assert made.data.steps == 6
    assert made.data.looked_at == 2
    assert made.data.tokens == sum(4 + k + 30 for k in range(10)) / 2
    assert made.data.loss_tokens == 10 * 30 / 2
    assert made.data.micro_batches == 1
    lengths = [4 + k + length for k in range(10) for length in (10, 20)]
    assert made.data.lengths == (int(np.median(lengths)), int(np.quantile(lengths, 0.9)), 33)


def test_three_steps_are_tried_where_they_fit(model: Path, trees: list[Tree]) -> None:
    made = make_plan(load_policy(str(model)), trees, resolve("dpo", None, ["batch_size=4"]))
    assert made.fits
    assert made.advice == ()
    assert made.timing is not None
    assert made.timing.fastest <= made.timing.training <= made.timing.slowest
    assert made.timing.reference > 0
    assert made.timing.peak > 0
    assert made.reference is not None


def test_a_reward_model_has_no_reference_pass(model: Path, trees: list[Tree]) -> None:
    made = make_plan(load_reward_model(str(model)), trees, resolve("reward"))
    assert made.reference is None
    assert made.timing is not None
    assert made.timing.reference == 0
    assert made.memory.logits == 0


def test_what_does_not_fit_is_not_tried_and_gets_advice(
    tmp_path: Path, trees: list[Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change that is named makes the run smaller, and is a setting that the recipe takes."""
    monkeypatch.setattr(plan, "usable_memory", lambda _: 1000)
    model = save_tiny(tmp_path / "model", "llama", hidden_size=256, intermediate_size=768)
    made = make_plan(load_policy(str(model)), trees * 10, resolve("dpo", None, ["batch_size=50"]))
    assert not made.fits
    assert made.timing is None
    assert made.data.micro_batches > 1
    typed = [advice.type for advice in made.advice]
    assert "--set engine.activation_checkpointing=on" in typed
    assert "--lora" in typed
    for advice in made.advice:
        words = advice.type.split()
        settings = [word for flag, word in pairwise(words) if flag == "--set"]
        assert resolve("dpo", None, settings)
        if "--processes" not in words:  # a layer that is gathered may be larger than all of a tiny model's shards
            assert advice.memory < made.needed, advice.what


def test_planning_an_ensemble_is_refused(model: Path, trees: list[Tree]) -> None:
    with pytest.raises(ConfigError, match="members"):
        make_plan(load_reward_model(str(model)), trees, resolve("reward", None, ["reward_model.members=2"]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Name colour {k}.", "chosen": "Blue." * (1 + k % 3), "rejected": "No."} for k in range(12)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("more", [(), ("--lora",), ("--set", "engine.activation_checkpointing=on")])
def test_the_command_says_what_a_run_costs_and_writes_nothing(
    more: tuple[str, ...], model: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    assert run(["plan", "dpo", "--model", str(model), "--data", str(data), *more]) == 0
    said = capsys.readouterr().out
    for words in ("Tokens per step:", "optimiser moments", "in all", "it fits", "Measured peak", "Training:"):
        assert words in said
    assert ("computed again" in said) == ("engine.activation_checkpointing=on" in more)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_lists_what_to_change_and_ends_with_1(
    model: Path, data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "usable_memory", lambda _: 1000)
    assert run(["plan", "dpo", "--model", str(model), "--data", str(data)]) == 1
    said = capsys.readouterr().out
    assert "it does not fit" in said
    assert "too much" in said
    assert "--lora" in said


def test_four_bits_on_a_cpu_are_a_clear_error(model: Path, data: Path, capsys: Any) -> None:
    setting = 'lora.quantise="nf4"'
    assert run(["plan", "dpo", "--model", str(model), "--data", str(data), "--set", setting]) == 1
    assert "4-bit weights need CUDA" in capsys.readouterr().err
