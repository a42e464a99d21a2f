"""Tiny models twice: as Accord runs them on prompt trees, and as plain transformers models on padded rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from accord.models.load import load_policy
from accord.models.network import Policy
from accord.models.packing import pack
from accord.models.tiny import save_tiny
from accord.models.trees import Branch, Tree

# Threads cost more than they bring where the models are tiny, most of all when tests run on every core.
torch.set_num_threads(1)

Pair = tuple[Policy, Any]
Answer = tuple[list[Tensor], dict[str, Tensor]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """`tiny("llama", **settings)`: the same weights as an Accord policy and as a plain (eager) transformers model."""
    made: dict[str, Pair] = {}

    def make(architecture: str, **settings: Any) -> Pair:
        key = f"{architecture} {sorted(settings.items())}"
        if key not in made:
            directory = save_tiny(tmp_path_factory.mktemp(architecture) / "model", architecture, **settings)
            plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            if architecture != "mamba":
                plain.set_attn_implementation("eager")
            made[key] = load_policy(str(directory), device=torch.device("cpu")), plain.eval()
        return made[key]

    return make


@pytest.fixture(scope="session")
def random_tree() -> Callable[..., Tree]:
    """`random_tree(rng, prompt=5, lengths=(3, 4))`: random tokens; about two thirds of the tokens carry loss."""

    def make(rng: np.random.Generator, prompt: int, lengths: Sequence[int]) -> Tree:
        branches = tuple(Branch(rng.integers(3, 259, length), rng.random(length) < 0.67) for length in lengths)
        return Tree(rng.integers(3, 259, prompt), branches, ranks=tuple(range(len(lengths))))

    return make


def weight(tree: Tree, branch: int) -> Tensor:
    """Some weights drawn from the tree itself, so that Σ weight · ℓ tells every token from every other in any order."""
    phase = int(tree.digest()[:6], 16) % 97 + 3.0 * branch
    return torch.cos(torch.arange(len(tree.branches[branch].tokens_L)) + phase)


@pytest.fixture(scope="session")
def packed_answer() -> Callable[..., Answer]:
    """Log-probabilities of every branch (zero where none is wanted), and every parameter's gradient of Σ weight · ℓ."""

    def ask(policy: Policy, trees: Sequence[Tree], budget: int = 4096) -> Answer:
        policy.model.zero_grad()
        said: dict[tuple[int, int], Tensor] = {}
        for batch in pack(trees, budget, branching=policy.branching):
            logprobs_N = policy(batch).logprobs_N
            assert logprobs_N is not None
            owners = [(part.tree, k) for part in batch.parts for k in part.branches]
            total = torch.zeros(())
            for completion, (t, k) in enumerate(owners):
                mask = torch.from_numpy(wanted(trees[t], k))
                values = torch.zeros(len(mask)).masked_scatter(mask, logprobs_N[batch.branch_N == completion])
                assert (t, k) not in said, "a branch was packed twice"
                said[t, k] = values.detach()
                total = total + (values * weight(trees[t], k)).sum()
            if total.requires_grad:
                total.backward()
        order = [(t, k) for t, tree in enumerate(trees) for k in range(len(tree.branches))]
        assert sorted(said) == order
        return [said[key] for key in order], gradients(policy.model)

    return ask


@pytest.fixture(scope="session")
def plain_answer() -> Callable[..., Answer]:
    """The same from a plain transformers model: one right-padded row per completion, its own prompt in front."""

    def ask(model: Any, trees: Sequence[Tree]) -> Answer:
        model.zero_grad()
        rows = [(t, k, tree, branch) for t, tree in enumerate(trees) for k, branch in enumerate(tree.branches)]
        sequences = [torch.from_numpy(np.concatenate([tree.prompt_P, b.tokens_L])) for _, _, tree, b in rows]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits.float()
        logprobs = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
        said, total = [], torch.zeros(())
        for index, (_, k, tree, branch) in enumerate(rows):
            P, L = len(tree.prompt_P), len(branch.tokens_L)
            row = torch.cat([torch.zeros(1), logprobs[index]])[P : P + L]
            values = row * torch.from_numpy(wanted(tree, k))
            said.append(values.detach())
            total = total + (values * weight(tree, k)).sum()
        total.backward()
        return said, gradients(model)

    return ask


def wanted(tree: Tree, branch: int) -> Any:
    """Which tokens have a log-probability: those that carry loss and have a token before them."""
    mask = tree.branches[branch].loss_mask_L.copy()
    mask[0] &= len(tree.prompt_P) > 0
    return mask


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Log-probabilities within `atol`; each parameter's gradient within `rtol` of its norm.

    Some gradients are zero by mathematics (a key bias moves all scores of a row alike), so what is left of them is
    rounding: they are measured against a millionth of the norm of the whole gradient.
    """

    def check(first: Answer, second: Answer, atol: float = 1e-4, rtol: float = 1e-4) -> None:
        assert len(first[0]) == len(second[0])
        for values, expected in zip(first[0], second[0], strict=True):
            torch.testing.assert_close(values, expected, atol=atol, rtol=0)
        assert first[1].keys() == second[1].keys()
        whole = float(torch.stack([g.norm() for g in second[1].values()]).norm())
        for name, gradient in first[1].items():
            error = float((gradient - second[1][name]).norm())
            bound = rtol * float(second[1][name].norm()) + 1e-6 * whole
            assert error <= bound, f"{name}: {error} > {bound}"

    return check
