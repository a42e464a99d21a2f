"""Checkpoints: what was saved comes back bit for bit, whole or not at all, and only to the model it belongs to."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from accord.engine.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.errors import ResourceError, RunError
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Network
from accord.models.trees import Tree


def engine_of(network: Network, *, lora: bool = False) -> Engine:
    if lora:
        add_lora(network, LoRAConfig(rank=4))
    return Engine(network, EngineConfig(precision="float32"), OptimizerConfig(weight_decay=0.01))


def advance(engine: Engine, trees: list[Tree], bound: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(engine.forward_backward(trees, bound)["loss"])
        engine.optim_step(1e-2)
    return losses


def state(engine: Engine) -> dict[str, torch.Tensor]:
    assert engine.optimizer is not None
    found = {}
    for name, parameter in engine.network.model.named_parameters():
        found[name] = parameter.detach()
        for key, value in engine.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_training_goes_on_to_the_same_bits(
    lora: bool, network: Any, some_trees: list[Tree], bound: Any, tmp_path: Path
) -> None:
    straight = engine_of(network(), lora=lora)
    advance(straight, some_trees, bound("sft"), 2)
    save_checkpoint(straight, tmp_path, 2)
    losses = advance(straight, some_trees, bound("sft"), 2)
    resumed = engine_of(network(), lora=lora)
    assert load_checkpoint(resumed, tmp_path / "2") == 2
    assert advance(resumed, some_trees, bound("sft"), 2) == losses
    expected, got = state(straight), state(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_before_the_first_step_is_one_too(
    network: Any, some_trees: list[Tree], bound: Any, tmp_path: Path
) -> None:
    save_checkpoint(engine_of(network()), tmp_path, 0)
    resumed, fresh = engine_of(network()), engine_of(network())
    assert load_checkpoint(resumed, tmp_path / "0") == 0
    assert advance(resumed, some_trees, bound("sft"), 2) == advance(fresh, some_trees, bound("sft"), 2)


def test_only_the_newest_is_kept_and_found(network: Any, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    engine = engine_of(network())
    for step in (5, 10, 100):
        save_checkpoint(engine, tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["100"]
    (tmp_path / ".101.half-written").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "100"


def test_a_checkpoint_of_another_model_is_refused(network: Any, tmp_path: Path) -> None:
    """Other names, adapters instead of weights, weights instead of adapters, adapters of another rank."""
    save_checkpoint(engine_of(network()), tmp_path, 3)
    for other in (engine_of(network("gpt2")), engine_of(network(), lora=True)):
        with pytest.raises(RunError, match="does not fit the model: Missing key"):
            load_checkpoint(other, tmp_path / "3")
    save_checkpoint(engine_of(network(), lora=True), tmp_path, 4)
    with pytest.raises(RunError, match="does not fit the model: Missing key"):
        load_checkpoint(engine_of(network()), tmp_path / "4")
    larger = network()
    add_lora(larger, LoRAConfig(rank=8))
    with pytest.raises(RunError, match="does not fit the model: Size mismatch"):
        load_checkpoint(engine_of(larger), tmp_path / "4")


@pytest.mark.parametrize("damage", [b"", b"garbage"])
def test_a_damaged_checkpoint_is_one_message(damage: bytes, network: Any, tmp_path: Path) -> None:
    save_checkpoint(engine_of(network()), tmp_path, 3)
    for path in (tmp_path / "3").iterdir():
        path.write_bytes(damage)
    with pytest.raises(RunError, match="does not fit the model: ") as caught:
        load_checkpoint(engine_of(network()), tmp_path / "3")
    assert caught.value.where == str(tmp_path / "3")
    assert "CheckpointException" not in str(caught.value)


def test_a_full_disk_keeps_the_checkpoint_before(
    network: Any, some_trees: list[Tree], bound: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the second checkpoint is flushed: one message, and the first one still loads."""
    engine = engine_of(network())
    advance(engine, some_trees, bound("sft"), 1)
    save_checkpoint(engine, tmp_path, 1)
    saved = {name: tensor.clone() for name, tensor in state(engine).items()}
    advance(engine, some_trees, bound("sft"), 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="The disk is full"):
            save_checkpoint(engine, tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    resumed = engine_of(network())
    load_checkpoint(resumed, tmp_path / "1")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state(resumed).items())
