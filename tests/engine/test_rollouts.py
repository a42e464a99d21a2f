"""Rollouts through the engine: one gradient however they are packed and divided, value heads, critics, temperature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.errors import AccordError, ModelError
from accord.losses import LOSSES
from accord.models.load import load_critic, load_policy
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Network, Policy
from accord.models.tiny import save_tiny
from accord.models.trees import Branch, Tree
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig

FLOAT32 = EngineConfig(precision="float32")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ppo_clip", {"kl_coefficient": 0.1, "entropy_coefficient": 0.05}),
    ("ppo_clip", {"ratio_level": "sequence_mean"}),
    ("ppo", {"value_coefficient": 0.5, "entropy_coefficient": 0.05}),
    ("cispo", {"ratio_level": "sequence_sum", "kl_coefficient": 0.1, "kl_estimator": "k2"}),
]


def rollout(rng: np.random.Generator, length: int) -> Branch:
    def some(low: float, high: float) -> Any:
        return rng.uniform(low, high, length).astype(np.float32)

    mask = rng.random(length) < 0.8
    mask[-1] = True
    return Branch(
        rng.integers(3, 259, length),
        mask,
        reference_L=some(-7, -4),
        behaviour_L=some(-7, -4),
        advantage_L=some(-1, 1),
        weight_L=some(0.5, 2),
        value_L=some(-1, 1),
        return_L=some(-1, 1),
    )


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    """Groups of three, two and one."""
    rng = np.random.default_rng(7)
    shapes = [(9, (5, 7, 3)), (4, (12, 2)), (15, (6,)), (1, (4, 4))]
    return [
        Tree(rng.integers(3, 259, prompt), tuple(rollout(rng, length) for length in lengths), ranks=(0,) * len(lengths))
        for prompt, lengths in shapes
    ]


@pytest.fixture(scope="module")
def policy(network: Any) -> Policy:
    """With a value head that says something."""
    policy: Policy = network()
    policy.add_value_head()
    with torch.no_grad():
        policy.model.value_head.weight.copy_(torch.linspace(-0.3, 0.3, policy.model.config.hidden_size)[None])
    return policy


def gradients(
    network: Network,
    trees: list[Tree],
    case: tuple[str, dict[str, Any]],
    *,
    tokens: int = 4096,
    passes: Any = "auto",
    denominator: float | None = None,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    network.model.zero_grad()
    engine = Engine(network, EngineConfig(precision="float32", micro_batch_tokens=tokens))
    metrics = engine.forward_backward(trees, LOSSES[case[0]].bind(case[1]), passes, denominator)
    return metrics, {n: p.grad.clone() for n, p in network.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_one_pass_and_two_passes_give_the_same_gradient(
    case: Any, policy: Policy, trees: list[Tree], assert_close_gradients: Any
) -> None:
    one, expected = gradients(policy, trees, case, passes="one")
    two, found = gradients(policy, trees, case, tokens=20, passes="two")
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert_close_gradients(found, expected, rtol=2e-5)
    assert ("value_head.weight" in found) == (case[0] == "ppo")


@settings(max_examples=10)
@given(st.permutations(range(4)), st.integers(1, 60), st.sampled_from(CASES), st.sampled_from([None, 11.5]))
def test_packing_changes_neither_loss_nor_gradient(
    policy: Policy,
    trees: list[Tree],
    assert_close_gradients: Any,
    order: list[int],
    tokens: int,
    case: Any,
    denominator: float | None,
) -> None:
    expected = gradients(policy, trees, case, denominator=denominator)
    found = gradients(policy, [trees[i] for i in order], case, tokens=tokens, denominator=denominator)
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    assert_close_gradients(found[1], expected[1], rtol=2e-5)


def test_two_halves_with_the_denominator_of_the_whole_add_up(
    policy: Policy, trees: list[Tree], assert_close_gradients: Any
) -> None:
    """Weights on loss tokens, summed by hand, are the default denominator."""
    weight = float(sum(branch.weight_L[branch.loss_mask_L].sum() for tree in trees for branch in tree.branches))
    whole, expected = gradients(policy, trees, CASES[0])
    parts = [gradients(policy, half, CASES[0], denominator=weight) for half in (trees[:1], trees[1:])]
    assert sum(metrics["loss"] for metrics, _ in parts) == pytest.approx(whole["loss"], rel=1e-5)
    assert_close_gradients({name: parts[0][1][name] + parts[1][1][name] for name in expected}, expected, rtol=1e-5)


def test_groups_without_an_advantage_can_be_left_out(
    policy: Policy, trees: list[Tree], assert_close_gradients: Any
) -> None:
    """Same gradient, less work: they keep their share of the denominator."""
    case = ("ppo_clip", {"clip_high": 0.3})
    assert LOSSES["ppo_clip"].bind(case[1]).loss.only_advantage
    idle = [
        replace(tree, branches=tuple(replace(b, advantage_L=0 * b.advantage_L) for b in tree.branches))
        for tree in trees[2:]
    ]
    weight = float(sum(branch.weight_L[branch.loss_mask_L].sum() for tree in trees for branch in tree.branches))
    whole, expected = gradients(policy, trees[:2] + idle, case)
    less, found = gradients(policy, trees[:2], case, denominator=weight)
    assert less["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert_close_gradients(found, expected, rtol=1e-5)


def test_tokens_weigh_1_by_default_and_nothing_without_weight(policy: Policy, trees: list[Tree]) -> None:
    def weighing(weight: float | None) -> list[Tree]:
        def branch(b: Branch) -> Branch:
            return replace(b, weight_L=None if weight is None else np.full(len(b.tokens_L), weight, np.float32))

        return [replace(tree, branches=tuple(map(branch, tree.branches))) for tree in trees]

    plain, _ = gradients(policy, weighing(None), CASES[1])
    assert gradients(policy, weighing(3.0), CASES[1])[0] == pytest.approx(plain, rel=1e-5)
    with pytest.raises(AccordError, match="nothing to learn from"):
        gradients(policy, weighing(0.0), CASES[1], denominator=4.0)


@pytest.mark.parametrize(
    ("name", "missing"), [("ppo_clip", "advantage_L"), ("cispo", "advantage_L"), ("value", "return_L")]
)
def test_what_a_branch_does_not_carry_is_named(name: str, missing: str, network: Any, trees: list[Tree]) -> None:
    bare = [replace(t, branches=tuple(replace(b, **{missing: None}) for b in t.branches)) for t in trees]
    with pytest.raises(ValueError, match=missing):
        gradients(critic_of(network) if name == "value" else network(), bare, (name, {}))


@pytest.mark.parametrize("passes", ["one", "two"])
def test_without_what_sampled_ratios_are_1(policy: Policy, trees: list[Tree], passes: Any) -> None:
    """The same as if the policy of now had sampled, so that nothing is clipped."""
    case = ("ppo_clip", {"ratio_level": "sequence_sum", "clip_low": 1e-4, "clip_high": 1e-4})
    said = Engine(policy, EngineConfig(precision="float32")).forward(trees)
    own = [
        replace(t, branches=tuple(replace(b, behaviour_L=now) for b, now in zip(t.branches, row, strict=True)))
        for t, row in zip(trees, said, strict=True)
    ]
    bare = [replace(t, branches=tuple(replace(b, behaviour_L=None) for b in t.branches)) for t in trees]
    metrics, found = gradients(policy, bare, case, passes=passes)
    assert metrics["val/ratio"] == 1
    assert metrics["clip_ratio/region_mean"] == 0
    expected = gradients(policy, own, (case[0], {**case[1], "clip_low": 0.2, "clip_high": 0.2}))[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_entropies_and_values_come_by_name(policy: Policy, trees: list[Tree]) -> None:
    """Against the plain model: the same tokens alone, its own softmax, the head's own product."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(policy.model.name_or_path)
    wanted = frozenset({"constant_entropy", "values"})
    answers = Engine(policy, EngineConfig(precision="float32", micro_batch_tokens=20)).forward_statistics(trees, wanted)
    for tree, row in zip(trees, answers, strict=True):
        for branch, named in zip(tree.branches, row, strict=True):
            with torch.no_grad():
                ids = torch.from_numpy(np.concatenate([tree.prompt_P, branch.tokens_L]))[None]
                said = plain(ids, output_hidden_states=True)
                logp = torch.log_softmax(said.logits[0, len(tree.prompt_P) - 1 : -1], -1)
                state = said.hidden_states[-1][0, len(tree.prompt_P) - 1 : -1]
                values = policy.model.value_head(state)[:, 0]
            entropy = -(logp.exp() * logp).sum(-1)
            for name, expected in (("constant_entropy", entropy), ("values", values)):
                np.testing.assert_allclose(named[name], np.where(branch.loss_mask_L, expected, 0), atol=1e-4)
            assert named.keys() == {"logprobs", *wanted}


def critic_of(network: Any) -> Network:
    """A critic on the body of a tiny reward model."""
    reward = network(reward=True)
    return load_critic(reward.model.name_or_path, reward.tokenizer, device=torch.device("cpu"))


def test_a_critic_says_of_the_last_state_what_its_reward_model_says(network: Any, trees: list[Tree]) -> None:
    """The value before token t + 1 is the reward model's score of the completion up to token t."""
    critic, reward = critic_of(network), network(reward=True)
    longer = Tree(trees[2].prompt_P, (replace(trees[2].branches[0], loss_mask_L=np.ones(6, bool)),))
    ((named,),) = Engine(critic, FLOAT32).forward_statistics([longer], frozenset({"values"}))
    assert named.keys() == {"values"}
    shorter = [Tree(longer.prompt_P, (Branch(longer.branches[0].tokens_L[:n], np.ones(n, bool)),)) for n in range(1, 6)]
    scores = [answer[0][0] for answer in Engine(reward, FLOAT32).forward(shorter)]
    np.testing.assert_allclose(named["values"][1:], scores, atol=1e-5)


def test_a_critic_learns_values_and_is_saved_as_a_reward_model(network: Any, trees: list[Tree], tmp_path: Path) -> None:
    critic = critic_of(network)
    engine = Engine(critic, FLOAT32, OptimizerConfig())
    bound = LOSSES["value"].bind({"value_clip": 0.0})
    errors = []
    for _ in range(15):
        errors.append(engine.forward_backward(trees, bound)["loss"])
        engine.optim_step(3e-3)
    assert errors[-1] < 0.7 * errors[0]
    critic.save(tmp_path / "critic")
    again = load_critic(str(tmp_path / "critic"), critic.tokenizer, device=torch.device("cpu"))
    wanted = frozenset({"values"})
    one, two = (Engine(each, FLOAT32).forward_statistics(trees, wanted) for each in (critic, again))
    np.testing.assert_array_equal(one[0][1]["values"], two[0][1]["values"])


def test_a_critic_from_a_policy_starts_at_zero_and_must_read_its_tokens(tiny_directory: Any, trees: list[Tree]) -> None:
    directory = str(tiny_directory())
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    critic = load_critic(directory, tokenizer, device=torch.device("cpu"))
    ((named, *_), *_) = Engine(critic, FLOAT32).forward_statistics(trees, frozenset({"values"}))
    assert not named["values"].any()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="not those of the policy"):
        load_critic(directory, tokenizer, device=torch.device("cpu"))


@pytest.mark.parametrize("lora", [False, True])
def test_a_value_head_is_trained_saved_apart_and_loaded(
    lora: bool, network: Any, trees: list[Tree], tmp_path: Path
) -> None:
    policy: Policy = network()
    before = policy.fingerprint()
    if lora:
        add_lora(policy, LoRAConfig(rank=2))
    policy.add_value_head()
    assert policy.fingerprint() == before
    engine = Engine(policy, FLOAT32, OptimizerConfig())
    engine.forward_backward(trees, LOSSES["ppo"].bind({}))
    engine.optim_step(1e-2)
    policy.save(tmp_path / "model")
    policy.save_value_head(tmp_path / "critic.safetensors")
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert files
    assert not any("value_head" in file.read_bytes()[:100_000].decode("latin-1") for file in files)
    again = load_policy(str(tmp_path / "model"), device=torch.device("cpu"))
    again.load_value_head(tmp_path / "critic.safetensors")
    wanted = frozenset({"values"})
    one, two = (Engine(each, FLOAT32).forward_statistics(trees, wanted) for each in (policy, again))
    assert one[0][1]["values"].any()
    np.testing.assert_allclose(one[0][1]["values"], two[0][1]["values"], atol=1e-5)
    np.testing.assert_allclose(one[0][1]["logprobs"], two[0][1]["logprobs"], atol=1e-4)


def test_a_value_head_of_another_model_is_refused(network: Any, tmp_path: Path) -> None:
    policy: Policy = network()
    policy.add_value_head()
    policy.save_value_head(tmp_path / "critic.safetensors")
    small = load_policy(str(save_tiny(tmp_path / "small", hidden_size=16)), device=torch.device("cpu"))
    for path in (tmp_path / "critic.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(ModelError, match="cannot be loaded"):
            small.load_value_head(path)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_at_its_temperature_a_policy_scores_what_was_sampled(architecture: str, network: Any) -> None:
    """Gemma 2 has a soft cap, which comes before the temperature."""
    policy: Policy = network(architecture)
    requests = [Request(f"p{n}", tuple(range(5 + n, 12 + n)), seed=n) for n in range(3)]
    config = SamplingConfig(max_new_tokens=12, temperature=0.7)
    completions = LocalSampler(policy, "float32").sample(requests, config)
    trees = [
        Tree(np.array(r.prompt_ids), (Branch(np.array(c.token_ids), np.ones(len(c.token_ids), bool)),))
        for r, c in zip(requests, completions, strict=True)
    ]
    raw = Engine(policy, FLOAT32).forward(trees)
    policy.temperature = 0.7
    shaped = Engine(policy, FLOAT32).forward(trees)
    again = LocalSampler(policy, "float32").sample(requests, config)
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]
    for place, completion in enumerate(completions):
        np.testing.assert_allclose(shaped[place][0], completion.logprobs, atol=1e-4)
        np.testing.assert_allclose(raw[place][0], completion.raw_logprobs, atol=1e-4)
    assert max(abs(a - b) for c in completions for a, b in zip(c.logprobs, c.raw_logprobs, strict=True)) > 0.01
