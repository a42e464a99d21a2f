"""Several servers of `accord sample-server` as one sampler, and the same servers as Ray actors."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from accord.engine.actors import InActor, actors
from accord.engine.precision import Precision
from accord.errors import SamplerError
from accord.models.network import Policy
from accord.sampling.connection import HTTPConfig
from accord.sampling.remote import Exchange, LoadCall, RemoteSampler
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.sampler import Follow, OnFinish, by_turns, hash_weights, split
from accord.types import Completion

__all__ = ["PoolSampler", "ray_samplers"]

_ATTEMPTS = 4
"""How often a server is asked, the last three times after it was looked for anew."""


class PoolSampler:
    """Each server samples a share of the prompts. One that is lost is looked for anew, and asked for what is missing.

    Weights are written once, and every server reads them and checks their hash.

    Attributes:
        policy_version, weights_hash: of what `load` gave to all of them; 0 and empty before that.
    """

    def __init__(self, places: Sequence[Callable[[], str]], exchange: Path) -> None:
        """
        Args:
            places: say the address of each server, now; called again where the server there is lost.
            exchange: a directory that this process and all servers see: weights go through it.
        """
        self._members = [_Member(place, exchange) for place in places]
        self._exchange = Exchange(exchange)
        self.policy_version, self.weights_hash = 0, ""

    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        """Have all servers sample from these weights from now on, under this version; see `Sampler.load`."""
        expected = hash_weights(policy, state)
        path = self._exchange.write(version, policy, state)
        call = LoadCall(version, expected, str(path), adapter=policy.adapter is not None)
        with ThreadPoolExecutor(len(self._members)) as threads:
            list(threads.map(lambda member: member.load(call), self._members))
        self._exchange.loaded(path)
        self.policy_version, self.weights_hash = version, expected

    def sample(
        self,
        requests: Sequence[Request],
        config: SamplingConfig,
        *,
        on_finish: OnFinish | None = None,
        follow: Follow | None = None,
    ) -> list[Completion]:
        """One completion per request, in the order of the requests; see `Sampler.sample`.

        Requests that follow are divided among the servers anew, turn by turn.
        """
        if follow is None:
            return self._sample(requests, config, on_finish)
        return by_turns(lambda turn, tell: self._sample(turn, config, tell), requests, follow, on_finish)

    def _sample(
        self, requests: Sequence[Request], config: SamplingConfig, on_finish: OnFinish | None
    ) -> list[Completion]:
        """What was asked for, all at once.

        Where a server fails for good, the others finish their shares before its error is raised.
        """
        finished: dict[int, Completion] = {}
        news: SimpleQueue[tuple[int, Completion] | None] = SimpleQueue()
        unwanted = threading.Event()

        def tell(index: int, completion: Completion) -> None:
            news.put((index, completion))
            if unwanted.is_set():
                raise _UnwantedError

        def ask(member: _Member, mine: Sequence[int]) -> None:
            try:
                member.sample({index: requests[index] for index in mine}, config, tell)
            finally:
                news.put(None)

        shares = split(requests, config, len(self._members))
        with ThreadPoolExecutor(len(self._members)) as threads:
            futures = [threads.submit(ask, *each) for each in zip(self._members, shares, strict=True)]
            try:
                for _ in futures:
                    while (item := news.get()) is not None:
                        finished[item[0]] = item[1]
                        if on_finish is not None:  # in the caller's thread, as every sampler does
                            on_finish(*item)
            except BaseException:
                unwanted.set()
                raise
        for future in futures:
            future.result()
        return [finished[index] for index in range(len(requests))]


class _UnwantedError(Exception):
    """Ends a share whose completions nobody waits for any more."""


class _Member:
    """One server of a pool, wherever it is now."""

    def __init__(self, place: Callable[[], str], exchange: Path) -> None:
        self._place, self._exchange = place, exchange
        self._sampler: RemoteSampler | None = None
        self._call: LoadCall | None = None

    def load(self, call: LoadCall) -> None:
        self._call = call
        self._insist(lambda _: None)

    def sample(self, requests: Mapping[int, Request], config: SamplingConfig, tell: OnFinish) -> None:
        missing = dict(requests)

        def ask(sampler: RemoteSampler) -> None:
            order = list(missing)

            def finish(place: int, completion: Completion) -> None:
                del missing[order[place]]
                tell(order[place], completion)

            sampler.sample([missing[index] for index in order], config, on_finish=finish)

        self._insist(ask)

    def _insist(self, act: Callable[[RemoteSampler], None]) -> None:
        """`act` with a server that has the weights; one that fails is looked for anew."""
        for attempts in range(1, _ATTEMPTS + 1):
            try:
                act(self._ready())
                return
            except SamplerError as error:
                if attempts == _ATTEMPTS:
                    raise
                self._sampler = None
                print(f"A sampler is looked for anew: {error.what}", file=sys.stderr)

    def _ready(self) -> RemoteSampler:
        if self._sampler is None:
            self._sampler = RemoteSampler(HTTPConfig(url=self._place(), exchange=self._exchange, retries=2))
        call = self._call
        if call and (self._sampler.policy_version, self._sampler.weights_hash) != (
            call.policy_version,
            call.weights_hash,
        ):
            self._sampler.take(call)
        return self._sampler


@contextmanager
def ray_samplers(model: str, precision: Precision, count: int, exchange: Path) -> Iterator[PoolSampler]:
    """A pool of so many Ray actors, each a server with the model, on a GPU of its own where there are any."""
    with actors(_ServerActor, (model, precision), count, gpus=1 if torch.cuda.is_available() else 0) as started:
        try:
            yield PoolSampler([partial(actor.call, "url") for actor in started], exchange)
        finally:
            shutil.rmtree(exchange, ignore_errors=True)


class _ServerActor(InActor):
    """A server in the process of an actor."""

    def __init__(self, directory: str, model: str, precision: Precision) -> None:
        super().__init__(directory)
        self._model, self._precision = model, precision
        self._url: str | None = None

    def url(self) -> str:
        """Where it listens; the first call starts it."""
        if self._url is None:
            import ray

            from accord.sampling.serve import SampleServer

            server = SampleServer(self._model, host=ray.util.get_node_ip_address(), precision=self._precision)
            threading.Thread(target=server.run, daemon=True).start()
            self._url = server.url
        return self._url
