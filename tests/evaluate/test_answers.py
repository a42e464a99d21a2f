"""Answers of two models that do not write the same tokens, or not from their whole distribution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accord.cli.evaluate import compare, reward
from accord.errors import ModelError
from accord.evaluate.answers import judged_trees
from accord.models.load import load_policy, load_reward_model
from accord.models.tiny import save_tiny
from accord.sampling.request import SamplingConfig
from accord.types import Completion, Message, Prompt

PROMPTS = [Prompt("plain", "abba"), Prompt("chat", (Message("user", "bab"),))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens for a and b are exchanged."""
    path = save_tiny(tmp_path_factory.mktemp("other") / "model")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def said(policy: Any, prompt: Prompt, text: str) -> Completion:
    ids = (*policy.tokenizer.encode(text, add_special_tokens=False), policy.tokenizer.eos_token_id)
    numbers = (0.0,) * len(ids)
    return Completion(prompt.id, text, ids, numbers, numbers, "stop", temperature=1.0, seed=0)


def test_a_judge_with_another_tokenizer_reads_the_same_text(model: Path, stranger: Path) -> None:
    policy = load_policy(str(model))
    answers = [said(policy, prompt, "aab") for prompt in PROMPTS]
    for place in (model, stranger):
        judge = load_reward_model(str(place))
        for tree in judged_trees(judge, policy, PROMPTS, answers):
            (branch,) = tree.branches
            assert judge.tokenizer.decode(branch.tokens_L) == "aab<|im_end|>"
            prompt = judge.tokenizer.decode(tree.prompt_P)
            assert ("abba" in prompt) == (not prompt.startswith("<|im_start|>"))


def test_a_model_without_a_trained_score_is_no_judge(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(ModelError, match="no trained score head"):
        reward(model=str(model), data=str(tmp_path / "pairs.jsonl"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "shaped"),
    [
        ({}, False),
        ({"max_new_tokens": 3, "stop": ["."]}, False),
        ({"temperature": 0.5}, True),
        ({"top_p": 0.5}, True),
        ({"top_k": 2}, True),
        ({"min_p": 0.1}, True),
        ({"logit_bias": {"4": 1.0}}, True),
    ],
)
def test_which_settings_shape_the_distribution(settings: dict[str, Any], shaped: bool) -> None:
    assert SamplingConfig.build(settings).shaped == shaped


@pytest.mark.parametrize(
    ("other", "more", "reason"),
    [(True, (), "different tokenizers"), (False, ("min_p=0.2",), "whole distribution"), (False, (), None)],
)
def test_a_divergence_that_would_mean_nothing_is_not_measured(
    model: Path, stranger: Path, tmp_path: Path, other: bool, more: tuple[str, ...], reason: str | None
) -> None:
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "ba"))
    (tmp_path / "prompts.jsonl").write_text(rows)
    compare(
        model=str(stranger if other else model),
        baseline=str(model),
        data=str(tmp_path / "prompts.jsonl"),
        out=tmp_path / "out",
        set=("max_new_tokens=3", *more),
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["comparison"]["kl"] is None) == (reason is not None)
    assert reason is None or reason in report["not_measured"]["kl"]
