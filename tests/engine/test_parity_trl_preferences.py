"""The same pairs, the same weights: every loss with a reference equal to TRL 1.16's DPOTrainer (float32)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from accord.engine.engine import Engine, EngineConfig
from accord.engine.reference import attach_reference
from accord.models.render import Renderer
from accord.types import PreferencePair

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

BETA = 0.3
ROWS = [
    {"prompt": "Name a colour:", "chosen": " blue", "rejected": " seven"},
    {"prompt": "2 + 2 =", "chosen": " four", "rejected": " 5"},
    {"prompt": "Say hello to everyone who came tonight.\n", "chosen": "Hello", "rejected": "No, not tonight."},
    {"prompt": "A", "chosen": "tiger", "rejected": "one that is longer"},
]
"""All chosen completions have one length: TRL's SFT term averages over the batch's tokens, Accord's over its pairs."""

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dpo", {}, {}),
    ("robust", {"label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    ("hinge", {}, {"loss_types": ["hinge"]}),
    ("ipo", {}, {"loss_types": ["ipo"]}),
    ("exo_pair", {"label_smoothing": 0.1}, {"loss_types": ["exo_pair"], "label_smoothing": 0.1}),
    ("nca_pair", {}, {"loss_types": ["nca_pair"]}),
    ("bco_pair", {}, {"loss_types": ["bco_pair"]}),
    ("sppo_hard", {}, {"loss_types": ["sppo_hard"]}),
    ("aot", {"label_smoothing": 0.2}, {"loss_types": ["aot"], "label_smoothing": 0.2}),
    ("aot_unpaired", {}, {"loss_types": ["aot_unpaired"]}),
    ("apo_zero", {}, {"loss_types": ["apo_zero"]}),
    ("apo_down", {}, {"loss_types": ["apo_down"]}),
    ("discopop", {}, {"loss_types": ["discopop"]}),
    ("sigmoid_norm", {}, {"loss_types": ["sigmoid_norm"]}),
    ("dpo", {"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ("dpo", {"divergence": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
    (
        "dpo",
        {"divergence": "alpha_divergence", "divergence_alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    ("ipo", {"divergence": "js_divergence"}, {"loss_types": ["ipo"], "f_divergence_type": "js_divergence"}),
    ("dpo", {"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    ("nca_pair", {"ld_alpha": 0.0}, {"loss_types": ["nca_pair"], "ld_alpha": 0.0}),
    ("dpo", {"wpo": True}, {"use_weighting": True}),
    ("ipo", {"wpo": True}, {"loss_types": ["ipo"], "use_weighting": True}),
    ("dpo", {"sft_weight": 0.7}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    (
        "mixture",
        {
            "parts": {
                "dpo": {"weight": 0.8, "beta": BETA, "sft_weight": 1.25},
                "bco_pair": {"weight": 0.2, "beta": BETA},
            }
        },
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
]


@pytest.fixture(scope="module")
def peer(tiny_directory: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer, with the statistics that WPO needs; the reference has other weights than the policy."""
    directory, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(tiny_directory("llama", seed=seed), dtype=torch.float32)
        for seed in (0, 1)
    )
    return trl.DPOTrainer(
        directory,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("peer")),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            beta=BETA,
            use_weighting=True,
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_directory("llama")),
    )


@pytest.fixture(scope="module")
def trees(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    policy = network("llama")
    trees = [Renderer(policy).tree(PreferencePair(r["prompt"], r["chosen"], r["rejected"])) for r in ROWS]
    engine = Engine(network("llama", seed=1), EngineConfig(precision="float32"))
    cache = tmp_path_factory.mktemp("reference") / "reference.sqlite"
    return attach_reference(engine, trees, cache, lambda *_: None)


@pytest.mark.parametrize(("name", "ours", "theirs"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_loss_gradient_and_metrics(
    name: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    peer: Any,
    trees: Any,
    network: Any,
    step: Any,
    bound: Any,
    assert_close_gradients: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one micro-batch, and as one for every completion, so that the two-pass way is compared too."""
    for attribute, value in {"use_weighting": False, "loss_weights": [1.0], **theirs}.items():
        monkeypatch.setattr(peer, attribute, value)
    peer.model.eval()
    peer.model.zero_grad()
    loss = peer.compute_loss(peer.model, peer.data_collator([dict(row) for row in peer.train_dataset]))
    loss.backward()
    expected = {n: p.grad.clone() for n, p in peer.model.named_parameters() if p.grad is not None}
    shown = {key: values[-1] for key, values in peer._metrics["eval"].items()}
    settings = ours if name == "mixture" else {"beta": BETA, **ours}
    for tokens in (4096, 1):
        metrics, gradients = step(network("llama"), trees, bound(name, **settings), tokens=tokens)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert_close_gradients(gradients, expected, rtol=2e-4)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
            assert metrics[key] == pytest.approx(shown[key], rel=1e-4, abs=1e-5), key
