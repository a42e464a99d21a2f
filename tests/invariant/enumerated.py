"""A language so small that everything about it is known: 8 letters, 4 of them a string, 4,096 strings in all.

The best policy is π* ∝ π_ref·exp(r/β) (Ziegler et al. 2019, eq. 2 and below; Rafailov et al. 2023, eq. 4), and so are
its reward, its KL to π_ref, and the most reward that any policy can have at a given KL. Policies are trained by the
same sampler, advantages, losses and engine as any other; how near they come to π* is computed by plain transformers.

S = all strings, L = 4 letters of one, K = sampled strings. Log-probabilities are in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from scipy.optimize import brentq
from scipy.special import logsumexp
from tokenizers import Tokenizer, models

from accord.advantages import ADVANTAGES, Average, BoundAdvantage, Group, token_weights
from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig, learning_rate_at
from accord.losses import LOSSES, BoundLoss
from accord.models.load import load_policy
from accord.models.network import Policy
from accord.models.tiny import tiny_model
from accord.models.trees import Branch, Tree
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig
from accord.types import Completion

Doubles = npt.NDArray[np.float64]

LETTERS, LENGTH = 8, 4
STRINGS = np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)))
"""Every string, in the order of the numbers that they are in base 8: [S, L]."""
PROMPT = np.zeros(1, np.int64)
_PLACES = LETTERS ** np.arange(LENGTH - 1, -1, -1)
_PER_TREE = 63
"""Strings of one tree: with the prompt 253 tokens, which attention computes as one product."""


@dataclass(frozen=True, eq=False)
class Point:
    """What is exactly true of a policy. `most` is the largest reward that any policy has at this KL, `logp_S` log π."""

    step: int
    distance: float
    """Total variation to π*: the largest difference of the probabilities of any set of strings."""
    reward: float
    kl: float
    most: float
    logp_S: Doubles


class World:
    """The language with a seeded reward and a random reference.

    A string's reward is what each letter earns at its place and what each pair of neighbours earns. Its standard
    deviation over all strings is β, so that π* is about as far from the reference whatever β is.
    """

    def __init__(self, directory: Path, *, beta: float = 2.0, seed: int = 0) -> None:
        self.directory, self.beta = directory, beta
        random = np.random.default_rng(seed)
        places, neighbours = random.normal(size=(LENGTH, LETTERS)), random.normal(size=(LETTERS, LETTERS))
        earned_S = places[np.arange(LENGTH), STRINGS].sum(1) + neighbours[STRINGS[:, :-1], STRINGS[:, 1:]].sum(1)
        self.reward_S: Doubles = beta * earned_S / earned_S.std()
        _save(directory, seed)
        self._plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.reference_SL = self.letters(load_policy(str(directory)))
        self.reference_S: Doubles = self.reference_SL.sum(1)
        self.optimum_S = self.tilted(beta)

    def policy(self) -> Policy:
        """A new policy that is the reference still."""
        return load_policy(str(self.directory), device=torch.device("cpu"))

    def branch(self, string: int) -> Branch:
        """A string as a completion, with what the reference says of it."""
        return Branch(STRINGS[string], np.ones(LENGTH, bool), self.reference_SL[string].astype(np.float32))

    def tilted(self, temperature: float) -> Doubles:
        """log π_ref·exp(r/temperature), normalised: the policy of most reward at its KL, [S]."""
        scores_S = self.reference_S + self.reward_S / temperature
        tilted_S: Doubles = scores_S - logsumexp(scores_S)
        return tilted_S

    def letterwise(self) -> Doubles:
        """Where a KL of each letter alone leads, blind to the KL of the letters that follow from it: log π, [S].

        From the last letter to the first, π(a | prefix) ∝ π_ref(a | prefix)·exp(Q/β), where Q is the mean reward of
        what π goes on to say. In π* it is the reward less the KL still to come.
        """
        value, logp = self.reward_S.reshape((LETTERS,) * LENGTH), np.zeros((LETTERS,) * LENGTH)
        for place in reversed(range(LENGTH)):
            later = LENGTH - 1 - place
            reference_S = self.reference_SL[:, place].reshape(logp.shape)
            scores = reference_S[(..., *(0,) * later)] + value / self.beta
            letter = scores - logsumexp(scores, axis=-1, keepdims=True)
            logp += letter[(..., *(None,) * later)]
            value = (np.exp(letter) * value).sum(-1)
        return logp.reshape(-1)

    def rescaled(self) -> Doubles:
        """Where scores that are divided by their standard deviation lead, while the KL is not: log π, [S].

        To divide the reward by σ is to multiply β by it, and σ is that of the policy's own rewards, so it is π* of a
        temperature τ with τ = β·σ of π* of τ.
        """

        def excess(temperature: float) -> float:
            p_S = np.exp(self.tilted(temperature))
            mean = p_S @ self.reward_S
            return self.beta * float(np.sqrt(p_S @ (self.reward_S - mean) ** 2)) - temperature

        return self.tilted(brentq(excess, 0.5 * self.beta, 10 * self.beta))

    def plain(self, policy: Policy) -> Any:
        """A plain transformers model with the policy's weights."""
        self._plain.load_state_dict({n: t for n, t in policy.state().items() if "value_head" not in n})
        self._plain.zero_grad()
        return self._plain

    def letters(self, policy: Policy) -> Doubles:
        """The log-probability of every letter of every string, by a plain model without packing: [S, L]."""
        with torch.no_grad():
            return _letters(self.plain(policy)).numpy()

    def log_probabilities(self, model: Any) -> torch.Tensor:
        """Of every string, with gradient: [S], float64."""
        return _letters(model).sum(1)

    def point(self, policy: Policy, step: int) -> Point:
        logp_S = self.letters(policy).sum(1)
        return self.point_of(logp_S, step)

    def point_of(self, logp_S: Doubles, step: int = 0) -> Point:
        p_S = np.exp(logp_S)
        reward, kl = float(p_S @ self.reward_S), float(p_S @ (logp_S - self.reference_S))
        return Point(step, distance(logp_S, self.optimum_S), reward, kl, self.frontier(kl), logp_S)

    def frontier(self, kl: float) -> float:
        """The most reward at this KL: min over λ of λ·(KL + log E_ref exp(r/λ)), where π_ref·exp(r/λ) has this KL."""

        def excess(log_temperature: float) -> float:
            tilted_S = self.tilted(np.exp(log_temperature))
            return float(np.exp(tilted_S) @ (tilted_S - self.reference_S)) - kl

        temperature = np.exp(brentq(excess, np.log(1e-2), np.log(1e4))) if kl > 1e-8 else 1e4
        partition = logsumexp(self.reference_S + self.reward_S / temperature)
        return float(temperature * (kl + partition))


def distance(logp_S: Doubles, other_S: Doubles) -> float:
    """Total variation: half the sum of the differences of all probabilities."""
    return 0.5 * float(np.abs(np.exp(logp_S) - np.exp(other_S)).sum())


def _letters(model: Any) -> torch.Tensor:
    prefixes = [[*PROMPT, *prefix] for prefix in itertools.product(range(LETTERS), repeat=LENGTH - 1)]
    said = model(torch.tensor(prefixes)).logits.double().log_softmax(-1)
    each = said.repeat_interleave(LETTERS, 0)  # a prefix of three letters begins eight strings
    return each.gather(2, torch.from_numpy(STRINGS)[..., None])[..., 0]


def _save(directory: Path, seed: int) -> None:
    """A random tiny transformer of 8 tokens. Its stop token is a ninth, which it cannot say: every string is whole."""
    sizes = {"vocab_size": LETTERS, "n_embd": 32, "n_layer": 2, "n_inner": 64, "n_positions": 64}
    model = tiny_model("gpt2", seed=seed + 1, initializer_range=0.1, bos_token_id=None, eos_token_id=None, **sizes)
    model.save_pretrained(directory)
    vocabulary = {letter: index for index, letter in enumerate([*"abcdefgh", "."])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=".", pad_token=".").save_pretrained(
        directory
    )


@dataclass(frozen=True)
class Method:
    """A loss, an advantage and how a step averages, each by name with its settings."""

    loss: tuple[str, dict[str, Any]]
    advantage: tuple[str, dict[str, Any]]
    average: Average = "sequence"
    epochs: int = 1

    def bound(self) -> tuple[BoundLoss, BoundAdvantage]:
        """Both under checked settings; the advantage has an empty memory."""
        (loss, settings), (advantage, others) = self.loss, self.advantage
        return LOSSES[loss].bind(settings), ADVANTAGES[advantage].bind(others)


def methods(beta: float) -> dict[str, Method]:
    """Methods whose fixed point is π*, and `grpo_letterwise` and `grpo_rescaled`, whose fixed points `World` tells.

    The KL of `grpo` is weighed by the ratio of the whole string, so its gradient holds what a letter does to the KL of
    the letters after it; each letter weighs 1 / L and has the whole string's gradient, so the coefficient is β·L.
    """
    whole = {"ratio_level": "sequence_sum"}
    with_kl = ("ppo_clip", {**whole, "kl_coefficient": LENGTH * beta})
    compare = ("group_relative", {"scale": "none"})
    critic = {"value_coefficient": 0.5, "value_clip": 0.0}
    return {
        "rloo": Method(("ppo_clip", whole), ("rloo", {"kl_coefficient": beta})),
        "grpo": Method(with_kl, compare),
        "grpo_letterwise": Method(("ppo_clip", {"kl_coefficient": beta}), compare),
        "grpo_rescaled": Method(with_kl, ("group_relative", {"scale": "group"})),
        "ppo": Method(
            ("ppo", critic), ("gae", {"kl_coefficient": beta, "whiten_advantages": False}), average="token", epochs=2
        ),
    }


class Student:
    """A policy that starts as the reference and is trained by the engine, a step at a time."""

    def __init__(self, world: World, loss: BoundLoss, *, steps: int, learning_rate: float = 0.01) -> None:
        self.world, self.loss, self.steps = world, loss, steps
        self.policy = world.policy()
        if "values" in loss.loss.statistics:
            self.policy.add_value_head()
        settings = EngineConfig(precision="float32", micro_batch_tokens=4096, activation_checkpointing="off")
        self.optimizer = OptimizerConfig(learning_rate=learning_rate, beta2=0.95, warmup=0.05)
        self.engine = Engine(self.policy, settings, self.optimizer)
        self.sampler = LocalSampler(self.policy, "float32")

    def learn(self, trees: Sequence[Tree], step: int, denominator: float | None = None) -> dict[str, float]:
        metrics = self.engine.forward_backward(trees, self.loss, denominator=denominator)
        self.engine.optim_step(learning_rate_at(step, self.steps, self.optimizer))
        return metrics

    def point(self, step: int) -> Point:
        return self.world.point(self.policy, step)

    def sample(self, count: int, seed: int) -> list[Completion]:
        requests = [Request("", tuple(PROMPT.tolist()), seed * count + number) for number in range(count)]
        return self.sampler.sample(requests, SamplingConfig(max_new_tokens=LENGTH, max_batch=count))

    def rollouts(
        self, completions: Sequence[Completion], advantage: BoundAdvantage, average: Average
    ) -> tuple[list[Tree], float]:
        """One group of all completions, as trees, and the denominator. Equal strings are one branch of their weight."""
        world, count = self.world, len(completions)
        string_K = np.array([completion.token_ids for completion in completions]) @ _PLACES
        string_U, first_U, number_K, times_U = np.unique(
            string_K, return_index=True, return_inverse=True, return_counts=True
        )
        behaviour_KL = np.array([completion.logprobs for completion in completions])
        branches = [
            replace(world.branch(string), behaviour_L=behaviour_KL[first].astype(np.float32))
            for string, first in zip(string_U, first_U, strict=True)
        ]
        group = Group(world.reward_S[string_K], (LENGTH,) * count)
        if advantage.needs_reference:
            group = replace(group, log_ratios=tuple(behaviour_KL - world.reference_SL[string_K]))
        if advantage.advantage.needs_values:
            said = self.engine.forward_statistics(in_trees(branches), frozenset({"values"}))
            value_U = [named["values"] for answer in said for named in answer]
            branches = [replace(branch, value_L=value_L) for branch, value_L in zip(branches, value_U, strict=True)]
            group = replace(group, values=tuple(value_U[number] for number in number_K))
        (credits,) = advantage([group])
        weights, denominator = token_weights(group.lengths, average, LENGTH)
        branches = [
            replace(
                branch,
                advantage_L=credits[first].advantage_L,
                return_L=credits[first].return_L,
                weight_L=np.full(LENGTH, weights[first] * times, np.float32),
            )
            for branch, first, times in zip(branches, first_U, times_U, strict=True)
        ]
        return in_trees(branches), denominator


def online(
    world: World,
    method: Method,
    *,
    steps: int,
    samples: int,
    learning_rate: float = 0.01,
    seed: int = 0,
    every: int = 10,
) -> list[Point]:
    """Sample, score, learn. Returns what is true before every so many steps and at the end."""
    loss, advantage = method.bound()
    student = Student(world, loss, steps=steps, learning_rate=learning_rate)
    points = []
    for step in range(steps):
        if step % every == 0:
            points.append(student.point(step))
        completions = student.sample(samples, seed * steps + step)
        trees, denominator = student.rollouts(completions, advantage, method.average)
        for _ in range(method.epochs):
            student.learn(trees, step, denominator)
    return [*points, student.point(steps)]


def rankings(world: World, count: int, size: int = _PER_TREE, seed: int = 0) -> list[Tree]:
    """Strings sampled from the reference, `size` at a time, each time ranked from best to worst.

    Scores are rewards with Gumbel noise, so an order is a sample of Plackett–Luce, in which every pair is one of
    Bradley–Terry: the first is before the second with probability σ(r₁ − r₂) (Rafailov et al. 2023, appendix A.3).
    """
    random = np.random.default_rng(seed)
    chance_S = np.exp(world.reference_S)
    trees = []
    for _ in range(count):
        string_K = random.choice(len(STRINGS), size, p=chance_S / chance_S.sum())
        rank_K = np.argsort(np.argsort(-(world.reward_S[string_K] + random.gumbel(size=size))))
        trees.append(Tree(PROMPT, tuple(world.branch(string) for string in string_K), tuple(rank_K.tolist())))
    return trees


def preferences(
    world: World,
    trees: Sequence[Tree],
    *,
    steps: int,
    learning_rate: float = 0.01,
    batch: int = 32,
    every: int = 10,
) -> list[Point]:
    """DPO on a data set of rankings, over and over if it is small."""
    student = Student(world, LOSSES["dpo"].bind({"beta": world.beta}), steps=steps, learning_rate=learning_rate)
    points = []
    for step in range(steps):
        if step % every == 0:
            points.append(student.point(step))
        student.learn([trees[(step * batch + place) % len(trees)] for place in range(min(batch, len(trees)))], step)
    return [*points, student.point(steps)]


def in_trees(branches: Sequence[Branch]) -> list[Tree]:
    """Strings as completions of the one prompt."""
    parts = [tuple(branches[start : start + _PER_TREE]) for start in range(0, len(branches), _PER_TREE)]
    return [Tree(PROMPT, part, ranks=(0,) * len(part)) for part in parts]
