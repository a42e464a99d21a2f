"""Sampling ahead of training: which weights sample which step, what corrects for their age, and how it ends."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from accord.errors import ConfigError, SamplerError
from accord.models.load import load_policy
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Policy
from accord.models.render import Renderer
from accord.models.trees import Branch, Tree
from accord.rewards import Rewards
from accord.sampling.local import LocalSampler
from accord.sampling.replica import Replica
from accord.sampling.sampler import Sampler
from accord.sampling.serve import SampleServer
from accord.train import OnlineConfig, Run, encode_prompts, provenance, resolve_online, train_online
from accord.train.ahead import Ahead
from accord.train.credit import corrected, groups_of, policy_trees, weighted_updates
from accord.train.online_config import RolloutConfig, method_of
from accord.train.rollouts import Rollouts, RolloutStore
from accord.types import Completion, Prompt

SETTINGS = ["batch_size=3", "rollout.completions=2", "sampling.max_new_tokens=6", "engine.precision=float32"]
SETTINGS += ["optimizer.learning_rate=0.01", "optimizer.warmup=0.0", "samples=0"]
LENGTH = {"rewards": [{"name": "length", "unit": "characters", "max": 1, "slope": 8}]}
CLOCK = re.compile(r"seconds|time/.*|sampling/tokens_per_second")


def config_of(name: str, *settings: str) -> OnlineConfig:
    return resolve_online(name, None, [*SETTINGS, *settings], LENGTH)


def train(model: Path, out: Path, config: OnlineConfig, sampler: Sampler | None = None, *, resume: bool = False) -> Run:
    policy = load_policy(str(model))
    records = [Prompt(f"p{i}", f"Say {i}:") for i in range(9)]
    encoded = encode_prompts(Renderer(policy), records, config.sampling.max_new_tokens)
    rewards = Rewards(config.rewards, policy.tokenizer)
    run = Run.open(out, config, provenance(policy, str(model), "numbers", [], config.seed), resume=resume)
    reference = load_policy(str(model)) if method_of(config).reads_reference and not config.lora else None
    train_online(policy, encoded, rewards, config, run, stage=out.name, reference=reference, sampler=sampler)
    return run


def rows(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not CLOCK.fullmatch(name)} for row in found]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "model").glob("*.safetensors")
    return safetensors.torch.load_file(file)


def versions(out: Path) -> set[tuple[int, int]]:
    with closing(sqlite3.connect(out / "rollouts.sqlite")) as file:
        return set(file.execute("SELECT step, version FROM completions"))


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_older_weights_a_run_ahead_is_the_run_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    """A single step: sampled by a thread from a copy of the weights, and learned from, to the same bits."""
    train(tiny_llama, tmp_path / "now", config_of("grpo", "steps=1"))
    ahead = config_of("grpo", "steps=1", "rollout.max_staleness=3", "rollout.importance_cap=0")
    train(tiny_llama, tmp_path / "ahead", ahead)
    assert rows(tmp_path / "ahead") == rows(tmp_path / "now")
    assert same(weights(tmp_path / "ahead"), weights(tmp_path / "now"))


@pytest.mark.parametrize(
    ("name", "more"),
    [("grpo", ()), ("ppo", ("rollout.mini_batches=2",)), ("online_dpo", ("lora.rank=2",))],
    ids=["grpo", "ppo", "online_dpo with lora"],
)
def test_steps_are_sampled_by_the_weights_that_the_settings_say(
    name: str, more: tuple[str, ...], tiny_llama: Path, tmp_path: Path
) -> None:
    """The lag reaches its bound and never passes it; a second run is the same to the bit, whatever was faster."""
    config = config_of(name, "steps=5", "rollout.max_staleness=2", *more)
    for out in (tmp_path / "first", tmp_path / "second"):
        train(tiny_llama, out, config)
        assert [row["sampling/version_lag"] for row in rows(out)] == [0, 1, 2, 2, 2]
        assert versions(out) == {(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)}
    assert rows(tmp_path / "first") == rows(tmp_path / "second")
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    if name == "online_dpo":
        assert not any("importance" in name for name in rows(tmp_path / "first")[0])
        return
    first, *_, last = rows(tmp_path / "first")
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert first["sampling/effective_sample_size"] == pytest.approx(1, abs=1e-4)
    assert last["sampling/sampling_logp_difference/max"] > 1e-3
    assert last["sampling/importance_sampling_ratio/min"] < 1 < last["sampling/importance_sampling_ratio/max"] <= 2


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_the_weights_of_a_version_are_those_that_were_given(adapter: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """The policy changes right after it was given; every step is what its own version samples, alone."""
    policy, other = load_policy(str(tiny_llama)), load_policy(str(tiny_llama))
    for network in (policy, other) if adapter else ():
        add_lora(network, LoRAConfig(rank=2), 0)
    make, config = maker(policy), config_of("grpo", "rollout.max_staleness=1")
    with closing(
        Ahead(policy, source := Replica(policy, "float32"), make(source), tmp_path, config, range(4))
    ) as ahead:
        for version in range(4):
            ahead.give(version, policy.state())
            change(policy, version)
        for step in range(4):
            ahead.wait(step)
    (tmp_path / "alone").mkdir()
    with closing(RolloutStore(tmp_path)) as store, closing(RolloutStore(tmp_path / "alone")) as alone:
        for step in range(4):
            if step > 1:
                change(other, step - 2)
            expected = make(LocalSampler(other, "float32"))(alone)
            expected.begin(step)
            expected.position = 3 * step
            _, completions = expected.complete(3)
            kept = store.completions(step, range(3))
            assert [kept[i, k].logprobs for i in range(3) for k in range(2)] == [c.logprobs for c in completions]
            assert {c.policy_version for c in kept.values()} == {max(0, step - 1)}


def maker(policy: Policy) -> Callable[[Sampler], Callable[[RolloutStore], Rollouts]]:
    encoded = encode_prompts(Renderer(policy), [Prompt(f"p{i}", f"Say {i}:") for i in range(9)], 6)
    config, rewards = config_of("grpo"), Rewards(LENGTH["rewards"])
    return lambda sampler: (
        lambda store: Rollouts(encoded, sampler, rewards, store, config.sampling, completions=2, seed=0)
    )


@torch.no_grad()
def change(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_the_correction_is_that_of_a_naive_computation() -> None:
    """Each token's weight is 1/L of its completion times min(e^(now − then), cap); what divides stays the same."""
    random = np.random.default_rng(0)
    moved, cap = [[0.1, -0.5, 1.0], [2.0], [-1.0, 0.2, 0.4, -0.1]], 1.5
    then = [random.normal(-1, 0.5, len(by)).astype(np.float32) for by in moved]
    now = [values + np.array(by, np.float32) for values, by in zip(then, moved, strict=True)]
    branches = [Branch(np.arange(len(b)), np.ones(len(b), bool), behaviour_L=b) for b in then]
    tree = Tree(np.array([1, 2]), tuple(branches), ranks=(0, 0, 0))
    (found,), metrics = corrected([tree], [now], cap)
    advantage = method_of(config_of("grpo")).advantage
    assert advantage is not None
    groups = groups_of([found], [np.array([0.0, 1.0, 2.0])], None)
    earning, idle = policy_trees([found], groups, advantage, RolloutConfig(), 8)
    expected, differences = [], []
    for branch, ours, old in zip(earning[0].branches, now, then, strict=True):
        assert branch.behaviour_L is not None
        assert branch.weight_L is not None
        np.testing.assert_array_equal(branch.behaviour_L, ours)
        ratios = [min(math.exp(float(a) - float(b)), cap) for a, b in zip(ours, old, strict=True)]
        np.testing.assert_allclose(branch.weight_L, np.array(ratios) / len(ours), rtol=1e-5)
        expected += ratios
        differences += [abs(float(a) - float(b)) for a, b in zip(ours, old, strict=True)]
    assert max(expected) == cap
    assert min(expected) < 1
    names = [f"sampling/importance_sampling_ratio/{what}" for what in ("min", "mean", "max")]
    assert [metrics[name] for name in names] == pytest.approx([min(expected), np.mean(expected), cap], rel=1e-5)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(np.mean(differences), rel=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(max(differences), rel=1e-5)
    size = sum(expected) ** 2 / (8 * sum(ratio**2 for ratio in expected))
    assert metrics["sampling/effective_sample_size"] == pytest.approx(size, rel=1e-5)
    (update,) = weighted_updates(earning, idle, RolloutConfig(), 8, (0, 0))
    assert update.denominator == 3


class Failing:
    """A sampler whose machine is gone after so many completions."""

    policy_version, weights_hash = 0, ""

    def __init__(self, model: Path, survives: int) -> None:
        self.sampler, self.survives = LocalSampler(load_policy(str(model)), "float32"), survives

    def load(self, version: int, policy: Policy, state: Any = None) -> None:  # noqa: ARG002
        self.sampler.policy.model.load_state_dict(state)
        self.sampler.policy_version = version

    def sample(self, requests: Sequence[Any], config: Any, *, on_finish: Any = None) -> list[Completion]:
        def finish(index: int, completion: Completion) -> None:
            if self.survives == 0:
                raise SamplerError("The machine is gone.", where="here", fix="Start it.")
            self.survives -= 1
            on_finish(index, completion)

        return self.sampler.sample(requests, config, on_finish=finish)


def test_a_sampler_that_fails_ends_the_run_with_its_error(tiny_llama: Path, tmp_path: Path) -> None:
    """Two steps and a part of the third were sampled: both are trained on and saved, and the run can go on."""
    config, out = config_of("grpo", "steps=4", "rollout.max_staleness=1"), tmp_path / "run"
    with pytest.raises(SamplerError, match="The machine is gone"):
        train(tiny_llama, out, config, Failing(tiny_llama, 15))
    assert not threads()
    assert (out / "checkpoints" / "2").is_dir()
    assert len(rows(out)) == 2
    train(tiny_llama, out, config, Failing(tiny_llama, 9), resume=True)  # 24 completions in all
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]
    assert max(step - version for step, version in versions(out)) == 1


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sampling"]


def test_the_thread_ends_when_nobody_wants_what_it_samples(tiny_llama: Path, tmp_path: Path) -> None:
    """Closed at the first completion: that one is kept, and no other is made."""
    policy, begun, closing_began = load_policy(str(tiny_llama)), threading.Event(), threading.Event()

    class Slow(Failing):
        def sample(self, requests: Sequence[Any], config: Any, *, on_finish: Any = None) -> list[Completion]:
            def finish(index: int, completion: Completion) -> None:
                begun.set()
                assert closing_began.wait(20)
                on_finish(index, completion)

            return self.sampler.sample(requests, config, on_finish=finish)

    slow = Slow(tiny_llama, 0)
    config = config_of("grpo", "rollout.max_staleness=1")
    ahead = Ahead(policy, slow, maker(policy)(slow), tmp_path, config, range(4))
    ahead.give(0, policy.state())
    assert begun.wait(20)
    ahead._unwanted.set()
    closing_began.set()
    ahead.close()
    assert not threads()
    with closing(RolloutStore(tmp_path)) as store:
        assert len(store.completions(0, range(3))) == 1


@pytest.fixture
def server(tiny_llama: Path) -> Iterator[SampleServer]:
    server = SampleServer(str(tiny_llama), precision="float32")
    threading.Thread(target=server.run, daemon=True).start()
    yield server
    server.close()


def test_a_server_samples_ahead_what_this_process_would(server: SampleServer, tiny_llama: Path, tmp_path: Path) -> None:
    from accord.sampling.http import connect

    settings = ["steps=3", "rollout.max_staleness=1", "optimizer.epsilon=0.1"]
    at = [f"sampler.url='{server.url}'", f"sampler.exchange='{tmp_path / 'exchange'}'"]
    remote = config_of("grpo", *settings, *at)
    assert remote.sampler is not None
    train(tiny_llama, tmp_path / "remote", remote, connect(remote.sampler))
    train(tiny_llama, tmp_path / "local", config_of("grpo", *settings))
    ours, theirs = rows(tmp_path / "remote"), rows(tmp_path / "local")
    assert [row["reward"] for row in ours] == [row["reward"] for row in theirs]
    assert [row["sampling/version_lag"] for row in ours] == [0, 1, 1]
    expected = weights(tmp_path / "local")
    for name, tensor in weights(tmp_path / "remote").items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("name", "settings", "where", "message"),
    [
        ("grpo", ["rollout.max_staleness=1", "rollout.dynamic_sampling=2"], "max_staleness", "depend on rewards"),
        ("grpo", ["rollout.max_staleness=-1"], "rollout.max_staleness", "greater than or equal to 0"),
        ("grpo", ["rollout.importance_cap=2.0"], "rollout.importance_cap", "nothing to correct"),
        ("grpo", ["rollout.importance_cap=0"], "rollout.importance_cap", "nothing to correct"),
        ("grpo", ["rollout.importance_cap=0.5", "rollout.max_staleness=1"], "rollout.importance_cap", "below 1"),
        ("online_dpo", ["rollout.importance_cap=2", "rollout.max_staleness=1"], "rollout.importance_cap", "no ratio"),
        ("reinforce", ["rollout.importance_cap=0", "rollout.max_staleness=1"], "rollout.importance_cap", "make up"),
    ],
)
def test_what_cannot_count_is_refused(name: str, settings: list[str], where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config_of(name, *settings)
    assert where in str(error.value)


def test_a_server_with_other_numerics_may_be_corrected() -> None:
    config = config_of("grpo", "rollout.importance_cap=2", "sampler.url='http://127.0.0.1:8001'")
    assert config.rollout.importance_cap == 2
