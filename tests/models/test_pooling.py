"""Pooling of reward models: what a score is read from, and that it is the same wherever the model is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from accord.engine.engine import Engine, EngineConfig
from accord.errors import ModelError
from accord.models.load import load_policy, load_reward_model
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import RewardModel, RewardModelConfig
from accord.models.tiny import save_tiny
from accord.models.trees import Branch, Tree

CPU = torch.device("cpu")
PROMPT = np.array([5, 6, 7])
COMPLETIONS = [np.array([8, 9, 2]), np.array([40]), np.array([100, 101, 102, 103, 104, 105])]
TREE = Tree(PROMPT, tuple(Branch(tokens, np.ones(len(tokens), bool)) for tokens in COMPLETIONS), ranks=(0, 1, 2))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama"))


def with_head(network: RewardModel) -> RewardModel:
    """The same network with a head that is not zero, and with trained weights where there are adapters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.model.named_parameters():
            if parameter.requires_grad and ("score" in name or "lora_B" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def scores(network: RewardModel) -> list[float]:
    (said,) = Engine(network, EngineConfig(precision="float32")).forward([TREE])
    return [float(score[0]) for score in said]


@torch.no_grad()
def test_a_mean_pooled_score_is_the_head_at_the_mean_over_the_completion(llama: str) -> None:
    network = with_head(load_reward_model(llama, RewardModelConfig(pooling="mean"), device=CPU))
    plain = transformers.AutoModel.from_pretrained(llama)
    weight = network.head.weight[0]
    expected = []
    for tokens in COMPLETIONS:
        states = plain(torch.from_numpy(np.concatenate([PROMPT, tokens]))[None]).last_hidden_state[0]
        expected.append(float(states[len(PROMPT) :].mean(0) @ weight))
    assert scores(network) == pytest.approx(expected, abs=1e-5)


def test_one_token_is_its_own_mean(llama: str) -> None:
    last, mean = (
        with_head(load_reward_model(llama, RewardModelConfig(pooling=p), device=CPU)) for p in ("last", "mean")
    )
    assert scores(last)[1] == pytest.approx(scores(mean)[1], abs=1e-6)
    assert scores(last)[2] != pytest.approx(scores(mean)[2], abs=1e-3)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_reward_model_loads_with_the_pooling_that_it_was_trained_with(
    llama: str, tmp_path: Path, pooling: Any, lora: bool
) -> None:
    network = load_reward_model(llama, RewardModelConfig(pooling=pooling), device=CPU)
    if lora:
        add_lora(network, LoRAConfig(rank=2))
    with_head(network).save(tmp_path / "model")
    again = load_reward_model(str(tmp_path / "model"), device=CPU)
    assert again.pooling == pooling
    assert scores(again) == pytest.approx(scores(network), abs=1e-5)
    assert max(map(abs, scores(again))) > 1e-3
    again.save(tmp_path / "again")
    assert scores(load_reward_model(str(tmp_path / "again"), device=CPU)) == pytest.approx(scores(network), abs=1e-5)


def test_last_pooling_leaves_no_key_of_ours(llama: str, tmp_path: Path) -> None:
    load_reward_model(llama, device=CPU).save(tmp_path / "model")
    assert "accord" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_another_pooling_than_it_was_trained_with_is_refused(llama: str, tmp_path: Path) -> None:
    load_reward_model(llama, RewardModelConfig(pooling="mean"), device=CPU).save(tmp_path / "model")
    with pytest.raises(ModelError, match="from the mean over tokens, not from the last token"):
        load_reward_model(str(tmp_path / "model"), RewardModelConfig(pooling="last"))
    with pytest.raises(ModelError, match="This is a reward model"):
        load_policy(str(tmp_path / "model"))


def test_transformers_says_that_it_finds_no_score_head(
    llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_reward_model(llama, RewardModelConfig(pooling="mean"), device=CPU).save(tmp_path / "model")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.logging.set_verbosity_warning()
    try:
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    finally:
        transformers.logging.set_verbosity_error()
    assert "mean_score.weight" in caplog.text
    assert "MISSING" in caplog.text


def test_peft_says_that_it_does_not_know_our_key(llama: str, tmp_path: Path) -> None:
    network = load_reward_model(llama, RewardModelConfig(pooling="mean"), device=CPU)
    add_lora(network, LoRAConfig(rank=2))
    network.save(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="accord"):
        peft.PeftConfig.from_pretrained(tmp_path / "adapter")


def test_models_whose_attention_cannot_branch_pool_the_same(llama: str) -> None:
    network = with_head(load_reward_model(llama, RewardModelConfig(pooling="mean"), device=CPU))
    together = scores(network)
    network.branching = False
    network.model.set_attn_implementation("sdpa")
    assert scores(network) == pytest.approx(together, abs=1e-5)
