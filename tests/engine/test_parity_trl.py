"""The same rows, the same weights: loss and every parameter's gradient equal to TRL 1.16's own trainers (float32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from accord.engine.engine import Engine, EngineConfig
from accord.engine.reference import attach_reference
from accord.models.render import Renderer
from accord.types import Demonstration, PreferencePair

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": "Name a colour:", "chosen": " blue", "rejected": " seven", "margin": 0.5},
    {"prompt": "2 + 2 =", "chosen": " 4, of course", "rejected": " 5", "margin": 0.0},
    {"prompt": "Say hello to everyone who came tonight.\n", "chosen": "Hello!", "rejected": "No.", "margin": 1.5},
    {"prompt": "A", "chosen": "B", "rejected": "one that is longer than the chosen one", "margin": 0.25},
]


def settings(tmp_path: Path) -> dict[str, Any]:
    """On the CPU in float32; with accelerate's defaults everything else is as TRL comes."""
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def peer_step(trainer: Any) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """TRL's loss, gradients and metrics on the whole data set as one batch."""
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    trainer.model.eval()  # no dropout: its SFT trainer leaves GPT-2's on
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, metrics


def plain(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def tokenizer(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    ("architecture", "name", "ours", "theirs"),
    [
        ("llama", "sft", {}, {}),
        ("gpt2", "sft", {}, {}),
        ("llama", "sft", {"label_smoothing": 0.2}, {"label_smoothing_factor": 0.2}),
        ("llama", "dft", {}, {"loss_type": "dft"}),
    ],
)
def test_sft(
    architecture: str,
    name: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    tiny_directory: Any,
    network: Any,
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
    tmp_path: Path,
) -> None:
    directory = tiny_directory(architecture)
    trainer = trl.SFTTrainer(
        plain(directory),
        trl.SFTConfig(**settings(tmp_path), **theirs),
        train_dataset=datasets.Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]),
        processing_class=tokenizer(directory),
    )
    loss, gradients, _ = peer_step(trainer)
    policy = network(architecture)
    trees = [Renderer(policy).tree(Demonstration(row["prompt"], row["chosen"])) for row in ROWS]
    for tokens in (4096, 30):
        metrics, found = step(policy, trees, bound(name, **ours), tokens=tokens)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert_close_gradients(found, gradients)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dpo(
    architecture: str,
    tiny_directory: Any,
    network: Any,
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
    tmp_path: Path,
) -> None:
    """The reference has other weights than the policy, so no term vanishes."""
    check_dpo(architecture, tiny_directory, network, step, bound, assert_close_gradients, tmp_path, ROWS)


def test_conservative_dpo(
    tiny_directory: Any, network: Any, step: Any, bound: Any, assert_close_gradients: Any, tmp_path: Path
) -> None:
    """TRL's `sigmoid` has no label smoothing; its `aot` of one pair is cDPO (sorting one number changes nothing)."""
    check_dpo(
        "llama",
        tiny_directory,
        network,
        step,
        bound,
        assert_close_gradients,
        tmp_path,
        ROWS[:1],
        smoothing=0.2,
        loss_type=["aot"],
    )


def check_dpo(
    architecture: str,
    tiny_directory: Any,
    network: Any,
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    smoothing: float = 0.0,
    loss_type: list[str] | None = None,
) -> None:
    directory, reference = tiny_directory(architecture), tiny_directory(architecture, seed=1)
    trainer = trl.DPOTrainer(
        plain(directory),
        ref_model=plain(reference),
        args=trl.DPOConfig(
            **settings(tmp_path), beta=0.3, label_smoothing=smoothing, loss_type=loss_type or ["sigmoid"]
        ),
        train_dataset=datasets.Dataset.from_list(rows).remove_columns("margin"),
        processing_class=tokenizer(directory),
    )
    loss, gradients, theirs = peer_step(trainer)
    policy = network(architecture)
    trees = [Renderer(policy).tree(PreferencePair(r["prompt"], r["chosen"], r["rejected"])) for r in rows]
    engine = Engine(network(architecture, seed=1), EngineConfig(precision="float32"))
    trees = attach_reference(engine, trees, tmp_path / "reference.sqlite", lambda *_: None)
    metrics, ours = step(policy, trees, bound("dpo", beta=0.3, label_smoothing=smoothing))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close_gradients(ours, gradients)
    shared = sorted(metrics.keys() & theirs.keys())
    assert shared == sorted(["logps/chosen", "logps/rejected", *(f"rewards/{m}" for m in REWARDS)])
    for name in shared:
        assert metrics[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


REWARDS = ("accuracies", "chosen", "margins", "rejected")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("margins", "centre"), [(False, 0.0), (True, 0.0), (True, 0.05)])
def test_reward_model(
    architecture: str,
    margins: bool,
    centre: float,
    tiny_directory: Any,
    network: Any,
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
    tmp_path: Path,
) -> None:
    """Both have the same random score head; TRL reads the score at the last token that is no padding."""
    directory = tiny_directory(architecture, reward=True)
    rows = datasets.Dataset.from_list(ROWS)
    trainer = trl.RewardTrainer(
        transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32),
        args=trl.RewardConfig(**settings(tmp_path), center_rewards_coefficient=centre or None),
        train_dataset=rows if margins else rows.remove_columns("margin"),
        processing_class=tokenizer(directory),
    )
    loss, gradients, theirs = peer_step(trainer)
    model = network(architecture, reward=True)
    trees = [
        Renderer(model).tree(
            PreferencePair(r["prompt"], r["chosen"], r["rejected"], margin=r["margin"] if margins else None)
        )
        for r in ROWS
    ]
    metrics, ours = step(model, trees, bound("bradley_terry", centre=centre))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close_gradients(ours, gradients)
    assert metrics["accuracy"] == theirs["accuracy"]
    for name in ("margin", "mean_reward"):
        assert metrics[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
