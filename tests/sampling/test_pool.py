"""Several servers as one sampler: the same completions, also when a server is lost under a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from accord.errors import SamplerError, StaleWeightsError
from accord.models.load import load_policy
from accord.models.lora import LoRAConfig, add_lora
from accord.models.network import Policy
from accord.models.tiny import save_tiny
from accord.sampling.local import LocalSampler
from accord.sampling.pool import PoolSampler
from accord.sampling.remote import LoadCall, SampleCall, Status
from accord.sampling.replica import Replica
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.sampler import hash_weights, split
from accord.sampling.serve import SampleServer

CONFIG = SamplingConfig(max_new_tokens=6)
REQUESTS = [Request(f"p{i}", (30, 40 + i, 50), seed=10 * i + k) for i in range(5) for k in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


class Server(SampleServer):
    """Notes the seeds that it samples. After `lives` completions it is lost: every answer breaks off."""

    # transformers cannot load two models at the same time in one process; other servers have processes of their own.
    loading = threading.Lock()

    def __init__(self, model: str, lives: int = 1000) -> None:
        super().__init__(model, precision="float32")
        self.seeds: list[int] = []
        self.lives = lives

    def load(self, call: LoadCall) -> Status:
        with self.loading:
            return super().load(call)

    def sample(self, call: SampleCall, reply: Any) -> None:
        tell = reply.completion

        def completion(index: int, completion: Any) -> None:
            if not self.lives:
                raise ConnectionAbortedError
            self.lives -= 1
            self.seeds.append(completion.seed)
            tell(index, completion)

        reply.completion = completion
        super().sample(call, reply)


@contextmanager
def running(servers: Sequence[SampleServer]) -> Iterator[None]:
    threads = [threading.Thread(target=server.run, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for server in servers:
            server.close()


@torch.no_grad()
def changed(policy: Policy) -> Policy:
    for parameter in policy.trainable():
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_a_pool_samples_what_one_process_does(adapter: bool, model: str, tmp_path: Path) -> None:
    policy = load_policy(model)
    if adapter:
        add_lora(policy, LoRAConfig(rank=2), 0)
    changed(policy)
    servers = [Server(model), Server(model)]
    told: list[int] = []
    with running(servers):
        pool = PoolSampler([lambda s=server: s.url for server in servers], tmp_path)
        pool.load(3, policy)
        assert (pool.policy_version, pool.weights_hash) == (3, hash_weights(policy))
        assert {server.status.weights_hash for server in servers} == {hash_weights(policy)}
        found = pool.sample(REQUESTS, CONFIG, on_finish=lambda index, _: told.append(index))
    expected = LocalSampler(policy, "float32").sample(REQUESTS, CONFIG)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.policy_version for each in found] == [3] * len(REQUESTS)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert sorted(told) == list(range(len(REQUESTS)))
    assert all(server.seeds for server in servers)
    assert [path.name for path in tmp_path.iterdir()] == ["00000003"]


def test_a_lost_server_is_replaced_and_asked_for_what_is_missing_only(model: str, tmp_path: Path) -> None:
    policy = changed(load_policy(model))
    first, other, second = Server(model, lives=2), Server(model), Server(model)
    with running([first, other, second]):
        pool = PoolSampler([lambda: second.url if not first.lives else first.url, lambda: other.url], tmp_path)
        pool.load(1, policy)
        found = pool.sample(REQUESTS, CONFIG)
    expected = LocalSampler(policy, "float32").sample(REQUESTS, CONFIG)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert len(first.seeds) == 2
    assert sorted([*first.seeds, *second.seeds, *other.seeds]) == sorted(request.seed for request in REQUESTS)
    assert second.status.weights_hash == hash_weights(policy)


def test_what_others_have_finished_is_told_before_the_error(model: str, tmp_path: Path) -> None:
    lost, other = Server(model, lives=1), Server(model)
    told: list[int] = []
    with running([lost, other]):
        pool = PoolSampler([lambda: lost.url, lambda: other.url], tmp_path)
        with pytest.raises(SamplerError, match="does not answer"):
            pool.sample(REQUESTS, CONFIG, on_finish=lambda index, _: told.append(index))
    assert len(told) == 1 + len(split(REQUESTS, CONFIG, 2)[1])


def test_an_error_of_the_caller_ends_the_call(model: str, tmp_path: Path) -> None:
    def stop(index: int, completion: Any) -> None:  # noqa: ARG001
        raise OSError("the disk is full")

    server = Server(model)
    with running([server]), pytest.raises(OSError, match="the disk is full"):
        PoolSampler([lambda: server.url], tmp_path).sample(REQUESTS, CONFIG, on_finish=stop)
    assert server.seeds


def test_shares_keep_the_completions_of_a_prompt_together() -> None:
    shares = split(REQUESTS, CONFIG, 2)
    assert sorted(index for mine in shares for index in mine) == list(range(len(REQUESTS)))
    owners = [{REQUESTS[index].prompt_id for index in mine} for mine in shares]
    assert not owners[0] & owners[1]
    assert sorted(map(len, shares)) == [6, 9]


def test_a_replica_refuses_the_weights_of_another_model(model: str) -> None:
    policy = load_policy(model)
    replica = Replica(policy, "float32")
    state = policy.state()
    state.pop(next(iter(state)))
    with pytest.raises(StaleWeightsError, match="another model"):
        replica.load(1, policy, state)
