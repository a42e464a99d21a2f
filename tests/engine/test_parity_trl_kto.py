"""The same rows, the same mismatched completions: KTO and APO-zero equal to TRL 1.16's KTOTrainer (float32)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from accord.engine.engine import Engine, EngineConfig
from accord.engine.reference import attach_reference
from accord.models.render import Renderer
from accord.models.trees import Branch, Tree, share_prompts
from accord.types import LabelledCompletion

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
torch = pytest.importorskip("torch")

ROWS = [
    {"prompt": "Name a colour:", "completion": " blue", "label": True},
    {"prompt": "2 + 2 =", "completion": " 5", "label": False},
    {"prompt": "Name a colour:", "completion": " seven, if I may say so", "label": False},
    {"prompt": "Say hello to everyone who came tonight.\n", "completion": "Hello!", "label": True},
    {"prompt": "A", "completion": "one that is longer than its prompt", "label": False},
]


def peer(directory: Path, reference: Path, tmp_path: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> Any:
    """TRL's trainer with the whole data set as one batch, its completions turned by one to make the mismatched ones."""

    def plain(path: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    return trl.KTOTrainer(
        plain(directory),
        ref_model=plain(reference),
        args=trl.KTOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=len(rows),
            beta=0.3,
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list(list(rows)),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
    )


def with_their_controls(trees: Sequence[Tree], mismatched: Sequence[Sequence[int]]) -> list[Tree]:
    """One labelled tree per row, with the mismatched completion that TRL gave to the row."""
    return [
        replace(tree, controls=(Branch(np.array(ids), np.ones(len(ids), dtype=np.bool_)),))
        for tree, ids in zip(trees, mismatched, strict=True)
    ]


def shared(trees: Sequence[Tree]) -> list[Tree]:
    """The trees by prompt, controls and all."""
    controls = share_prompts([replace(tree, branches=tree.controls) for tree in trees])
    return [replace(tree, controls=each.branches) for tree, each in zip(share_prompts(trees), controls, strict=True)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("labels", ["both", "good", "bad"])
@pytest.mark.parametrize(
    ("loss", "settings"),
    [("kto", {"desirable_weight": 1.5}), ("apo_zero_unpaired", {"undesirable_weight": 0.5})],
)
def test_loss_gradient_and_metrics(
    architecture: str,
    labels: str,
    loss: str,
    settings: dict[str, float],
    tiny_directory: Any,
    network: Any,
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
    tmp_path: Path,
) -> None:
    """The reference has other weights than the policy, so neither rewards nor KL vanish; a policy of seed 0 or 1 and
    the other as the reference gives a KL estimate of either sign."""
    rows = [row for row in ROWS if labels == "both" or row["label"] == (labels == "good")]
    kls = []
    for policy_seed in (0, 1):
        directory = tiny_directory(architecture, seed=policy_seed)
        trainer = peer(
            directory, tiny_directory(architecture, seed=1 - policy_seed), tmp_path, rows, loss_type=loss, **settings
        )
        batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
        trainer.model.eval()
        trainer.model.zero_grad()
        theirs = trainer.compute_loss(trainer.model, batch)
        theirs.backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}

        policy = network(architecture, seed=policy_seed)
        trees = [Renderer(policy).tree(LabelledCompletion(**row)) for row in rows]
        if loss == "kto":
            trees = with_their_controls(trees, trainer.train_dataset["KL_completion_ids"])
            trees = shared(trees)
        else:
            trees = share_prompts(trees)
        engine = Engine(network(architecture, seed=1 - policy_seed), EngineConfig(precision="float32"))
        trees = attach_reference(engine, trees, tmp_path / "reference.sqlite", lambda *_: None)
        for tokens in (4096, 20):
            ours, grads = step(policy, trees, bound(loss, beta=0.3, **settings), tokens=tokens)
            assert ours["loss"] == pytest.approx(theirs.item(), rel=1e-5)
            assert_close_gradients(grads, gradients)
            same = {name for name in metrics if name.startswith(("rewards/", "logps/"))} | ({"kl"} & ours.keys())
            assert same == ours.keys() - {"loss"}
            for name in same:
                assert ours[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
        kls.append(metrics["kl"])
    if loss == "kto" and labels == "both":
        assert max(kls) > 0
