"""What a run writes loads in transformers and peft, and says the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from accord.engine.engine import Engine, EngineConfig
from accord.models.load import load_policy, load_reward_model
from accord.models.network import Network
from accord.models.trees import Branch, Tree

CPU = torch.device("cpu")
ROWS = [[5, 6, 7, 8, 9, 2], [40, 41, 2], [100, 101, 102, 103, 104, 105, 106, 2]]


def trees() -> list[Tree]:
    """Each row as a prompt of two tokens and one completion."""
    return [Tree(np.array(row[:2]), (Branch(np.array(row[2:]), np.ones(len(row) - 2, bool)),)) for row in ROWS]


def answers(network: Network) -> list[list[float]]:
    engine = Engine(network, EngineConfig(precision="float32"))
    return [branch.tolist() for tree in engine.forward(trees()) for branch in tree]


def padded() -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ROWS], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def logprobs(model: Any) -> list[list[float]]:
    inputs = padded()
    values = torch.log_softmax(model(**inputs).logits[:, :-1], -1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    return [values[index, 1 : len(row) - 1].tolist() for index, row in enumerate(ROWS)]


@torch.no_grad()
def scores(model: Any) -> list[list[float]]:
    return [[score] for score in model(**padded()).logits[:, 0].tolist()]


def assert_close(first: list[list[float]], second: list[list[float]]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_policy_loads_in_transformers(kind: str, straight: Any, tiny_llama: Path) -> None:
    directory = straight(kind) / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert_close(logprobs(model), answers(load_policy(str(directory), device=CPU)))
    before = logprobs(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama))
    assert np.abs(np.concatenate(logprobs(model)) - np.concatenate(before)).max() > 1e-3, "training changed nothing"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith("<|im_start|>user")
    assert model.config.dtype == torch.float32


def test_an_adapter_loads_in_peft(straight: Any, tiny_llama: Path) -> None:
    directory = straight("sft", "--lora") / "model"
    assert (directory / "adapter_config.json").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = logprobs(base)
    adapted = logprobs(peft.PeftModel.from_pretrained(base, directory).eval())
    assert_close(adapted, answers(load_policy(str(directory), device=CPU)))
    assert np.abs(np.concatenate(adapted) - np.concatenate(before)).max() > 1e-3, "training changed nothing"


def test_a_reward_model_scores_the_same_in_transformers(straight: Any) -> None:
    """A right-padded batch: transformers reads the score at the last token that is no padding."""
    directory = straight("reward") / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    assert model.config.num_labels == 1
    ours = answers(load_reward_model(str(directory), device=CPU))
    assert max(abs(score) for (score,) in ours) > 1e-3, "training changed nothing"
    assert_close(scores(model), ours)


def test_a_reward_adapter_keeps_its_score_head(straight: Any, tiny_llama: Path) -> None:
    directory = straight("reward", "--lora") / "model"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    base.config.pad_token_id = 0
    ours = answers(load_reward_model(str(directory), device=CPU))
    assert max(abs(score) for (score,) in ours) > 1e-3, "the trained score head was lost"
    assert_close(scores(peft.PeftModel.from_pretrained(base, directory).eval()), ours)
