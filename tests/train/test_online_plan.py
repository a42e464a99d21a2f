"""A plan of an online run: what it counts is counted by hand, its advice is smaller, and it leaves nothing behind."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord.cli import run
from accord.engine import memory
from accord.engine.memory import MemoryModel, fit
from accord.models.load import load_critic, load_policy
from accord.models.tiny import save_tiny
from accord.sampling.local import LocalSampler
from accord.train import online_plan, resolve_online
from accord.train.online_plan import OnlinePlan, plan_online
from accord.train.rollouts import EncodedPrompt
from accord.types import Prompt

COMMON = ["engine.precision=float32", "batch_size=3", "sampling.max_new_tokens=20", "rollout.completions=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("plan") / "model", "llama")


@pytest.fixture(scope="module")
def prompts() -> list[EncodedPrompt]:
    """Ten prompts of 5 to 14 tokens."""
    return [EncodedPrompt(Prompt(f"p{k}", "x"), np.full(5 + k, 3)) for k in range(10)]


def planned(model: Path, prompts: list[EncodedPrompt], recipe: str, *settings: str, rewards: int = 0) -> OnlinePlan:
    config, policy = resolve_online(recipe, None, [*COMMON, *settings]), load_policy(str(model))
    critic = load_critic(config.critic.model, policy.tokenizer) if config.critic and config.critic.model else None
    return plan_online(policy, critic, prompts, config, program=1000, rewards=rewards)


def test_a_step_is_the_largest_that_there_can_be(model: Path, prompts: list[EncodedPrompt]) -> None:
    """The three longest prompts, each with its completions at their longest."""
    made = planned(model, prompts, "grpo")
    assert made.data.steps == 4
    assert made.data.lengths == (9, 13, 14)
    assert made.data.tokens == 14 + 13 + 12 + 3 * 4 * 20
    assert made.learning.program == 1000
    assert not made.beside
    assert made.fits
    assert planned(model, prompts, "online_dpo").data.tokens == 14 + 13 + 12 + 3 * 2 * 20
    assert planned(model, prompts, "rejection_sampling", "steps=7").data.tokens == 14 + 13 + 12 + 3 * 20
    assert planned(model, prompts, "rejection_sampling", "steps=7").data.steps == 7


def test_what_stands_beside_the_policy(model: Path, prompts: list[EncodedPrompt]) -> None:
    """A reference whose products' weights are in the precision of products, a critic with gradients and moments."""
    policy = load_policy(str(model))
    size = sum(parameter.nbytes for parameter in policy.model.parameters())
    linears = [m for m in policy.model.model.modules() if isinstance(m, torch.nn.Linear)]
    half = size - 2 * sum(module.weight.numel() for module in linears)
    assert planned(model, prompts, "rloo").beside == {"reference": size}
    assert planned(model, prompts, "rloo", "engine.precision=bfloat16").beside == {"reference": half}
    assert planned(model, prompts, "rloo", "lora={}").beside == {}
    assert planned(model, prompts, "grpo", rewards=77).beside == {"rewards": 77}
    made = planned(model, prompts, "ppo", "loss.name=ppo_clip", f"critic.model={model}")
    critic = sum(parameter.numel() for parameter in load_critic(str(model), policy.tokenizer).trainable())
    assert made.beside == {"reference": size, "critic": 16 * critic}
    assert made.critic > 16 * critic + 16 * size / 4 + size
    assert made.needed == max(made.critic, made.learning.total + size + 16 * critic)


def test_keys_values_and_logits_while_it_samples(model: Path, prompts: list[EncodedPrompt]) -> None:
    """Two heads of 8 in 3 layers; prompts are there twice, and at most `max_batch` sequences grow together."""
    per_token = 2 * 3 * 2 * 8 * 4
    assert LocalSampler(load_policy(str(model)), "float32").kept_per_token() == per_token
    assert LocalSampler(load_policy(str(model)), "bfloat16").kept_per_token() == per_token // 2
    made = planned(model, prompts, "grpo")
    assert made.sampling is not None
    assert made.sampling.workspace == per_token * (2 * 3 * 14 + 12 * 20) + 12 * 259 * 12
    few = planned(model, prompts, "grpo", "sampling.max_batch=4")
    assert few.sampling is not None
    assert few.sampling.workspace == per_token * (2 * 2 * 14 + 4 * 20) + 4 * 259 * 12
    assert planned(model, prompts, "grpo", 'sampler={url = "http://127.0.0.1:1"}').sampling is None


def test_what_does_not_fit_gets_advice(
    tmp_path: Path, prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change that is named makes the run smaller, and is a setting that the recipe takes."""
    monkeypatch.setattr(online_plan, "usable_memory", lambda _: 1000)
    model = save_tiny(tmp_path / "model", "llama", hidden_size=256, intermediate_size=768)
    made = planned(model, prompts, "rloo", "batch_size=10", "sampling.max_new_tokens=100")
    assert not made.fits
    typed = [advice.type for advice in made.advice]
    assert "--lora" in typed
    assert "--set engine.activation_checkpointing=on" in typed
    for advice in made.advice:
        settings = [word for flag, word in pairwise(advice.type.split()) if flag == "--set"]
        assert resolve_online("rloo", None, settings)
        assert advice.memory < made.needed, advice.what


def test_what_others_will_take_makes_micro_batches_smaller(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(model))
    counted = MemoryModel.of(policy, torch.float32)
    monkeypatch.setattr(memory, "usable_memory", lambda _: counted.program + (1 << 31))
    alone = fit(counted, policy.device, None, False)
    room = alone.capacity - alone.needed
    assert alone.tokens == 1024
    assert fit(counted, policy.device, None, False, beside=room).tokens == 1024
    assert fit(counted, policy.device, None, False, beside=room + 1).tokens < 1024


@pytest.fixture
def command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    rows = [{"prompt": f"Say {k}:"} for k in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    settings = [word for setting in COMMON for word in ("--set", setting)]
    return ["plan", "rloo", "--model", str(model), "--data", "prompts.jsonl", *settings]


def test_the_command_says_what_a_run_costs_and_leaves_nothing(command: list[str], tmp_path: Path, capsys: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run([*command, "--reward", "json_schema"]) == 0
    said = capsys.readouterr().out
    expected = ("Steps: 4, each of 3 prompts with 4", "reference model", "while it samples", "it fits", "Training:")
    for words in (*expected, "Measured peak of two steps:", "A step:", "sampling", "backward"):
        assert words in said
    assert sorted(tmp_path.rglob("*")) == before


def test_what_fails_when_it_is_tried_is_told(command: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.py").write_text("def broken(prompts, completions):\n    raise OSError('no such sensor: 7')\n")
    assert run([*command, "--reward", "./mine.py:broken"]) == 1
    said = capsys.readouterr().err
    assert "no such sensor: 7" in said
    assert "Traceback" not in said


def test_the_command_lists_what_to_change_and_ends_with_1(
    command: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_plan, "usable_memory", lambda _: 1000)
    assert run([*command, "--reward", "json_schema"]) == 1
    said = capsys.readouterr().out
    assert "it does not fit" in said
    assert "To change, with the memory that it would then need:" in said
    assert "Training:" not in said


def test_rewards_of_a_recipe_that_learns_from_data_are_refused(command: list[str], capsys: Any) -> None:
    assert run(["plan", "sft", *command[2:6], "--reward", "length"]) == 1
    assert "learns from data" in capsys.readouterr().err
