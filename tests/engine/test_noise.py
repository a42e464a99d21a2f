"""NEFTune: noise of the stated size on the embeddings, the same under any packing, and none outside of training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.errors import ConfigError
from accord.losses import LOSSES
from accord.models.noise import embedding_noise
from accord.models.packing import pack
from accord.models.trees import Branch, Tree
from accord.train.config import resolve

SFT = LOSSES["sft"].bind({})


def examples(count: int = 7) -> list[Tree]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 14, (count, 2))
    return [
        Tree(rng.integers(3, 259, prompt), (Branch(rng.integers(3, 259, answer), np.ones(answer, bool)),))
        for prompt, answer in lengths
    ]


def trained(
    network: Any, alpha: float, seed: int = 0, tokens: int = 1024, passes: Any = "one"
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss and gradients of one step under the noise of a seed."""
    made = network()
    made.noise = alpha
    engine = Engine(made, EngineConfig(micro_batch_tokens=tokens, precision="float32"), OptimizerConfig())
    torch.manual_seed(seed)
    metrics = engine.forward_backward(examples(), SFT, passes)
    return metrics, {name: parameter.grad for name, parameter in made.model.named_parameters()}


@torch.no_grad()
def test_noise_is_uniform_and_scaled_by_the_length_of_the_example(network: Any) -> None:
    """|ε|·√(L·d)/α ≤ 1 with variance 1/3; rows that fill up the batch stay as they are."""
    model = network().model
    (batch,) = pack(examples(), 1024)
    clean = model.get_input_embeddings()(batch.input_ids_T[None])
    torch.manual_seed(3)
    with embedding_noise(model, batch, 5.0):
        noise = (model.get_input_embeddings()(batch.input_ids_T[None]) - clean)[0]
    assert torch.equal(model.get_input_embeddings()(batch.input_ids_T[None]), clean)
    units, width = [], noise.shape[1]
    for layout in batch.layout[: len(batch.parts)]:
        length = layout.prompt.length + layout.branches[0].length
        units.append(noise[layout.prompt.start :][:length].flatten() * math.sqrt(length * width) / 5.0)
    drawn = torch.cat(units)
    assert drawn.abs().max() == pytest.approx(1, abs=1e-2)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02)
    assert float(drawn.var()) == pytest.approx(1 / 3, rel=0.03)
    used = sum(len(tree) for tree in examples())
    assert used < len(noise)
    assert not noise[used:].any()


@pytest.mark.parametrize(
    "other",
    [{"tokens": 24}, {"tokens": 1}, {"passes": "two"}, {"passes": "two", "tokens": 40}],
    ids=str,
)
def test_the_same_step_under_any_packing_and_any_passes(network: Any, other: dict[str, Any]) -> None:
    metrics, gradients = trained(network, 10.0)
    others, theirs = trained(network, 10.0, **other)
    assert others["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_noise_belongs_to_the_step_and_grows_with_alpha(network: Any) -> None:
    none, same = trained(network, 0.0)[0]["loss"], trained(network, 0.0, seed=1)[0]["loss"]
    assert none == same
    first, second = trained(network, 10.0, seed=0)[0]["loss"], trained(network, 10.0, seed=1)[0]["loss"]
    assert trained(network, 10.0, seed=0)[0]["loss"] == first
    assert len({none, first, second}) == 3
    assert abs(trained(network, 0.01)[0]["loss"] - none) < abs(first - none) / 50


def test_evaluation_has_no_noise(network: Any) -> None:
    made = network()
    engine = Engine(made, EngineConfig(precision="float32"), OptimizerConfig())
    clean, said = engine.evaluate(examples(), SFT), engine.forward(examples())
    made.noise = 10.0
    assert engine.evaluate(examples(), SFT) == clean
    for mine, theirs in zip(engine.forward(examples()), said, strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])
    assert engine.forward_backward(examples(), SFT)["loss"] != pytest.approx(clean["loss"], rel=1e-3)


def test_only_demonstrations_take_noise() -> None:
    assert resolve("dft", assignments=["neftune_alpha=5.0"]).neftune_alpha == 5
    for recipe in ("dpo", "kto", "reward", "orpo"):
        with pytest.raises(ConfigError, match=r"neftune_alpha: Noise is for learning from demonstrations(.|\n)*`sft`"):
            resolve(recipe, assignments=["neftune_alpha=5"])
    with pytest.raises(ConfigError, match="neftune_alpha"):
        resolve("sft", assignments=["neftune_alpha=-1"])
