"""The same tokens, the same weights: ORPO, CPO and SimPO equal to TRL 1.16's experimental trainers (float32)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from accord.models.trees import Branch, Tree

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
orpo = pytest.importorskip("trl.experimental.orpo")
cpo = pytest.importorskip("trl.experimental.cpo")

ANSWERS = [(" blue", " seven"), (" four", " 5"), ("Hello", "No, not tonight."), ("tiger", "one that is longer")]
"""All chosen completions have one length: TRL's SFT term averages over the batch's tokens, Accord's over its pairs."""
PROMPTS = ["Name a colour:", "2 + 2 =", "Say hello to everyone who came tonight.\n", "A"]
EMPTY = [""] * 4
"""TRL begins every prompt with the first token of the vocabulary's choice, so these are prompts of that one token. Its
ORPO counts the prompt in the SFT term from the second token on: with one token it agrees with the paper, and so with
Accord."""

CASES: list[tuple[str, dict[str, Any], list[str], dict[str, Any]]] = [
    ("orpo", {"beta": 0.3}, EMPTY, {"beta": 0.3}),
    ("cpo", {"beta": 0.3}, PROMPTS, {"beta": 0.3}),
    ("cpo", {"label_smoothing": 0.2, "sft_weight": 0.0}, PROMPTS, {"label_smoothing": 0.2, "cpo_alpha": 0.0}),
    (
        "simpo",
        {"beta": 2.0, "gamma": 0.5},
        PROMPTS,
        {"beta": 2.0, "simpo_gamma": 0.5, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
    (
        "simpo",
        {"gamma": 1.5, "label_smoothing": 0.1, "sft_weight": 0.7},
        PROMPTS,
        {"beta": 2.0, "simpo_gamma": 1.5, "loss_type": "simpo", "label_smoothing": 0.1, "cpo_alpha": 0.7},
    ),
    *(
        (
            "simpo",
            {"beta": 2.0, "gamma": 0.5, "alpha": alpha},
            PROMPTS,
            {"beta": 2.0, "simpo_gamma": 0.5, "loss_type": "alphapo", "alpha": alpha},
        )
        for alpha in (0.25, -0.5)
    ),
]


def tree(row: dict[str, Any]) -> Tree:
    """The tokens that TRL made of a row."""
    start = len(row["prompt_input_ids"])
    branches = []
    for side in ("chosen", "rejected"):
        tokens = np.array(row[f"{side}_input_ids"][start:])
        branches.append(Branch(tokens, np.array(row[f"{side}_labels"][start:]) != -100))
    return Tree(np.array(row["prompt_input_ids"]), tuple(branches), ranks=(0, 1))


@pytest.mark.parametrize(("name", "ours", "prompts", "theirs"), CASES)
def test_loss_gradient_and_metrics(
    name: str,
    ours: dict[str, Any],
    prompts: list[str],
    theirs: dict[str, Any],
    tiny_directory: Any,
    network: Any,
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
    tmp_path: Any,
) -> None:
    """As one micro-batch, and as one for every completion, so that the two-pass way is compared too."""
    directory = tiny_directory("llama")
    trainer_class, config_class = (
        (orpo.ORPOTrainer, orpo.ORPOConfig) if name == "orpo" else (cpo.CPOTrainer, cpo.CPOConfig)
    )
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in zip(prompts, ANSWERS, strict=True)]
    trainer = trainer_class(
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=config_class(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            **theirs,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
    )
    trainer.model.eval()
    features = [dict(row) for row in trainer.train_dataset]
    loss, shown = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(features))
    loss.backward()
    expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    for tokens in (4096, 1):
        trees = [tree(row) for row in features]
        metrics, gradients = step(network("llama"), trees, bound(name, **ours), tokens=tokens)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert_close_gradients(gradients, expected, rtol=2e-4)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
            assert metrics[key] == pytest.approx(shown[key], rel=1e-4, abs=1e-5), key
