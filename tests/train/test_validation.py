"""The held-out part: how it is split, when training stops, which weights are kept, and resuming within it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.engine.engine import Engine, EngineConfig
from accord.errors import ConfigError, EmptyDataError
from accord.models.load import load_reward_model
from accord.models.network import RewardModel
from accord.models.trees import Branch, Tree
from accord.tracking import read_metrics
from accord.train import Run, TrainConfig, bind_loss, resolve, train
from accord.train.validation import hold_out

CPU = torch.device("cpu")


def tree(prompt: int, word: int, better: int = 1) -> Tree:
    """A pair of which the completion with token `better` in front wins."""
    tokens = [np.array([3 + better, 20 + word, 2]), np.array([3 + 1 - better, 20 + word, 2])]
    branches = tuple(Branch(each, np.ones(3, bool)) for each in tokens)
    return Tree(np.array([50 + prompt, 60 + prompt]), branches, ranks=(0, 1))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.01, 0.9), st.integers(0, 5), st.randoms())
def test_a_split_is_by_prompt_and_does_not_depend_on_order(
    prompts: list[int], share: float, seed: int, random: Any
) -> None:
    trees = [tree(prompt, index) for index, prompt in enumerate(prompts)]
    names = {t.prompt_P.tobytes() for t in trees}
    if max(1, round(share * len(names))) >= len(names):
        with pytest.raises(EmptyDataError):
            hold_out(trees, share, seed)
        return
    kept, held = hold_out(trees, share, seed)
    sides = [{t.prompt_P.tobytes() for t in side} for side in (kept, held)]
    assert sides[0].isdisjoint(sides[1])
    assert len(kept) + len(held) == len(trees)
    assert len(sides[1]) == max(1, round(share * len(names)))
    random.shuffle(trees)
    assert {t.prompt_P.tobytes() for t in hold_out(trees, share, seed)[1]} == sides[1]


def contradiction() -> list[Tree]:
    """Training rows say one thing and held-out rows (seed 0) the opposite: the held-out loss can only rise."""
    trees = [tree(prompt, prompt % 5) for prompt in range(20)]
    held = {t.prompt_P.tobytes() for t in hold_out(trees, 0.2, 0)[1]}
    return [tree(p, p % 5, better=0 if t.prompt_P.tobytes() in held else 1) for p, t in enumerate(trees)]


def config(*assignments: str) -> TrainConfig:
    fixed = ["batch_size=4", "epochs=5", "optimizer.learning_rate=1e-3", "validation.share=0.2", "validation.every=2"]
    return resolve("reward", assignments=[*fixed, 'engine.precision="float32"', *assignments])


def run_it(directory: Path, model: Path, settings_: TrainConfig, trees: list[Tree]) -> RewardModel:
    network = load_reward_model(str(model), device=CPU)
    facts = {"data": "", "model": "", "template": ""}
    train(network, trees, settings_, Run.open(directory, settings_, facts, resume=True), stage="Test")
    return network


def heldout_loss(network: RewardModel, settings_: TrainConfig, trees: list[Tree]) -> float:
    held = hold_out(trees, settings_.validation.share, settings_.seed)[1]
    return Engine(network, EngineConfig(precision="float32")).evaluate(held, bind_loss(settings_))["loss"]


def test_training_stops_when_patience_runs_out_and_the_best_weights_are_saved(tmp_path: Path, tiny_llama: Path) -> None:
    settings_ = config("validation.patience=3")
    network = run_it(tmp_path, tiny_llama, settings_, contradiction())
    rows = [row for row in read_metrics(tmp_path) if "validation/loss" in row]
    losses = [row["validation/loss"] for row in rows]
    assert [row["step"] for row in rows] == [2, 4, 6, 8], "best at 2, then three evaluations without a better one"
    assert losses == sorted(losses)
    assert heldout_loss(network, settings_, contradiction()) == pytest.approx(losses[0], abs=1e-6)
    saved = load_reward_model(str(tmp_path / "model"), device=CPU)
    assert heldout_loss(saved, settings_, contradiction()) == pytest.approx(losses[0], abs=1e-6)
    assert not (tmp_path / "checkpoints").exists()


def test_without_patience_the_run_goes_on_to_its_end(tmp_path: Path, tiny_llama: Path) -> None:
    run_it(tmp_path, tiny_llama, config("validation.every=7", "max_steps=9"), contradiction())
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "validation/loss" in row] == [7, 9]
    assert all("validation/accuracy" in row for row in rows if "validation/loss" in row)


@pytest.mark.parametrize("killed_after", [3, 5, 8])
def test_a_resumed_run_decides_as_if_it_had_never_paused(
    tmp_path: Path, tiny_llama: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = config("validation.patience=3", "checkpoint_every=2")
    straight = run_it(tmp_path / "straight", tiny_llama, settings_, contradiction())

    step = Engine.optim_step
    count = iter(range(1, 1000))

    def killed(self: Engine, rate: float) -> float:
        if next(count) > killed_after:
            raise KeyboardInterrupt
        return step(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "optim_step", killed)
        if killed_after < 8:
            with pytest.raises(KeyboardInterrupt):
                run_it(tmp_path / "paused", tiny_llama, settings_, contradiction())
        else:  # killed between the last step and the saving of the model
            patch.setattr(RewardModel, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run_it(tmp_path / "paused", tiny_llama, settings_, contradiction())
    resumed = run_it(tmp_path / "paused", tiny_llama, settings_, contradiction())
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(tmp_path / name)]
                for name in ("straight", "paused")]  # fmt: skip
    assert timeless[0] == timeless[1]
    shutil.rmtree(tmp_path)


def test_settings_without_a_held_out_part_are_refused() -> None:
    with pytest.raises(ConfigError, match="Nothing is held out"):
        resolve("reward", assignments=["validation.patience=3"])
