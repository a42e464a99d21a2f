"""On CUDA the same numbers as on the CPU: log-probabilities, losses, gradients, samples; and the memory foretold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from accord.engine.engine import Engine, EngineConfig
from accord.engine.memory import Load, MemoryModel
from accord.engine.optimizer import OptimizerConfig
from accord.losses import LOSSES
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Network
from accord.models.packing import pack
from accord.models.trees import Tree
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig

pytestmark = pytest.mark.gpu

BRANCHING = ("llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "phi", "phi3", "mistral")


def step(
    network: Network, trees: Sequence[Tree], loss: str, passes: Any = "auto", **settings: Any
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and every parameter's gradient, brought to the CPU."""
    network.model.zero_grad()
    config = EngineConfig(**{"precision": "float32", "activation_checkpointing": "off", **settings})
    bound = LOSSES[loss].bind({})
    metrics = Engine(network, config, OptimizerConfig()).forward_backward(trees, bound, passes)
    return metrics["loss"], {n: p.grad.cpu() for n, p in network.model.named_parameters() if p.grad is not None}


def assert_same(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> None:
    """The loss within 1e-4; each gradient within 1e-3 of its norm, or a millionth of the whole."""
    assert first[0] == pytest.approx(second[0], abs=1e-4)
    assert first[1].keys() == second[1].keys()
    whole = float(torch.stack([g.norm() for g in second[1].values()]).norm())
    for name, gradient in first[1].items():
        error = float((gradient - second[1][name]).norm())
        assert error <= 1e-3 * float(second[1][name].norm()) + 1e-6 * whole, name


@pytest.mark.parametrize("architecture", [*BRANCHING, "bloom"])
def test_loss_and_gradients_of_a_policy(architecture: str, both: Any, trees: list[Tree]) -> None:
    cpu, cuda = both(architecture)
    assert cpu.branching == cuda.branching
    assert_same(step(cuda, trees, "dpo"), step(cpu, trees, "dpo"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loss_and_gradients_of_a_reward_model(architecture: str, both: Any, trees: list[Tree]) -> None:
    cpu, cuda = both(architecture, reward=True)
    assert_same(step(cuda, trees, "bradley_terry"), step(cpu, trees, "bradley_terry"))


@pytest.mark.parametrize("settings", [{"micro_batch_tokens": 64}, {"activation_checkpointing": "on"}])
def test_budget_passes_and_checkpointing_change_nothing(settings: Any, both: Any, trees: list[Tree]) -> None:
    cpu, cuda = both("llama")
    expected = step(cpu, trees, "dpo")
    assert_same(step(cuda, trees, "dpo", **settings), expected)
    cuda.model.gradient_checkpointing_disable()
    assert_same(step(cuda, trees, "dpo", passes="two", **settings), expected)


def test_log_probabilities_token_by_token(both: Any, trees: list[Tree]) -> None:
    cpu, cuda = both("gemma2")
    answers = [Engine(network, EngineConfig(precision="float32")).forward(trees) for network in (cpu, cuda)]
    for ours, theirs in zip(*answers, strict=True):
        for first, second in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-4)


def test_bfloat16_is_close_to_float32(both: Any, trees: list[Tree]) -> None:
    _, cuda = both("llama")
    exact, rough = step(cuda, trees, "sft"), step(cuda, trees, "sft", precision="bfloat16")
    assert rough[0] == pytest.approx(exact[0], rel=0.02)
    one, other = (torch.cat([g[1][n].flatten() for n in sorted(g[1])]) for g in (exact, rough))
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.98


def test_a_trained_step_is_the_same(both: Any, trees: list[Tree]) -> None:
    """Three steps of AdamW: parameters within 1e-5."""
    pair = both("qwen2")
    for network in pair:
        engine = Engine(network, EngineConfig(precision="float32"), OptimizerConfig())
        for _ in range(3):
            engine.forward_backward(trees, LOSSES["sft"].bind({}))
            engine.optim_step(1e-3)
    for first, second in zip(*(network.model.parameters() for network in pair), strict=True):
        torch.testing.assert_close(first, second.cpu(), atol=1e-4, rtol=0)


def test_greedy_samples_are_the_same(both: Any) -> None:
    requests = [Request(f"{k}", (5 + k, 9, 200), seed=k) for k in range(6)]
    config = SamplingConfig(temperature=0.0, max_new_tokens=12)
    cpu, cuda = (LocalSampler(network, "float32").sample(requests, config) for network in both("llama"))
    assert [completion.token_ids for completion in cpu] == [completion.token_ids for completion in cuda]


def test_lora(both: Any, trees: list[Tree]) -> None:
    cpu, cuda = both("llama")
    for network in (cpu, cuda):
        add_lora(network, LoRAConfig(rank=4))
    with torch.no_grad():
        for first, second in zip(cuda.trainable(), cpu.trainable(), strict=True):
            first.copy_(second)
    assert_same(step(cuda, trees, "dpo"), step(cpu, trees, "dpo"))


def test_qlora_trains_and_its_base_stays_the_reference(both: Any, trees: list[Tree]) -> None:
    pytest.importorskip("bitsandbytes")
    _, network = both("llama")
    config = LoRAConfig(rank=4, quantise="nf4")
    before = sum(p.nbytes for p in network.model.parameters())
    add_lora(network, config)
    assert sum(p.nbytes for p in network.model.parameters()) < before
    reference = Engine(network, EngineConfig()).forward(trees)
    engine = Engine(network, EngineConfig(), OptimizerConfig())
    for _ in range(2):
        engine.forward_backward(trees, LOSSES["sft"].bind({}))
        engine.optim_step(1e-2)
    trained = engine.forward(trees)
    with network.without_adapter():
        again = engine.forward(trees)
    assert all(
        np.allclose(a, b, atol=0.05) for x, y in zip(reference, again, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert any(
        not np.allclose(a, b, atol=0.1) for x, y in zip(trained, again, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_predicted_peak_is_the_measured_one(
    precision: str, checkpointing: bool, both: Any, trees: list[Tree]
) -> None:
    """Within 15 %, for a model whose weights and activations are alike in size."""
    _, network = both("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
    mode = "on" if checkpointing else "off"
    config = EngineConfig(precision=precision, activation_checkpointing=mode, micro_batch_tokens=512)
    engine = Engine(network, config, OptimizerConfig())
    model = MemoryModel.of(network, engine.dtype)
    batches = pack(trees * 4, 512)
    largest = max((Load.of(batch, network) for batch in batches), key=lambda load: load.tokens)
    predicted = model.training(largest, checkpointing=checkpointing, accumulates=len(batches) > 1).total
    for measured in range(3):
        if measured == 2:
            torch.cuda.reset_peak_memory_stats()
        engine.forward_backward(trees * 4, LOSSES["dpo"].bind({}))
        engine.optim_step(1e-5)
    assert torch.cuda.max_memory_allocated() == pytest.approx(predicted, rel=0.15)
