"""Sampling in another process: the client of `accord sample-server`, and the calls that travel between the two.

A call names the weights that it wants by version and hash; a server that has others refuses it. Completions come back
line by line as they are finished, so that none is lost if the server goes away: the others are asked for again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from accord.errors import SamplerError, StaleWeightsError
from accord.models.network import Policy
from accord.sampling.connection import Connection, HTTPConfig, TransientError, accord_error
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.sampler import Follow, OnFinish, by_turns, hash_weights
from accord.types import Completion

__all__ = ["ENGINE", "Exchange", "LoadCall", "RemoteSampler", "SampleCall", "Status"]

ENGINE = "accord"
"""What `Status.engine` says of our own server."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a server has: answer to GET /status and POST /load.

    Example: ``Status("accord", "starter", 3, "9f0c…")``
    """

    engine: str
    model: str
    policy_version: int
    weights_hash: str


@dataclass(frozen=True, slots=True)
class LoadCall:
    """POST /load: take the weights of this directory; they hash to this.

    Example: ``LoadCall(3, "9f0c…", "/data/exchange/00000003", adapter=False)``
    """

    policy_version: int
    weights_hash: str
    directory: str
    adapter: bool


@dataclass(frozen=True, slots=True)
class SampleCall:
    """POST /sample: complete these requests with these weights. Answers lines ``{"index": …, "completion": …}``.

    Example: ``SampleCall([Request("p", (1, 2), seed=0)], SamplingConfig(), 3, "9f0c…")``
    """

    requests: list[Request]
    config: SamplingConfig
    policy_version: int
    weights_hash: str


class Exchange:
    """The directory through which weights go to a server: one folder per version, the last one is kept."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._last: Path | None = None

    def write(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None) -> Path:
        """Write the policy's files; what it wrote before stays until `loaded`."""
        path = self._directory / f"{version:08d}"
        policy.save(path, state)
        return path

    def loaded(self, path: Path) -> None:
        """The server has these: remove those before."""
        if self._last is not None and self._last != path:
            shutil.rmtree(self._last, ignore_errors=True)
        self._last = path


class RemoteSampler:
    """Samples on a server of `accord sample-server`: the same completions as in process, to the token."""

    def __init__(self, config: HTTPConfig) -> None:
        """
        Raises:
            SamplerError: there is no such server.
        """
        self._server, self._exchange = Connection(config), Exchange(config.exchange)
        status = self._status(self._server.get("/status"))
        self.policy_version, self.weights_hash = status.policy_version, status.weights_hash

    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        """Sample from these weights from now on, under this version; see `Sampler.load`."""
        expected = hash_weights(policy, state)
        path = self._exchange.write(version, policy, state)
        self.take(LoadCall(version, expected, str(path), adapter=policy.adapter is not None))
        self._exchange.loaded(path)

    def take(self, call: LoadCall) -> None:
        """Have the server read weights that are written already.

        Raises:
            StaleWeightsError: it has other weights afterwards.
        """
        status = self._status(self._server.post("/load", TypeAdapter(LoadCall).dump_python(call)))
        wanted, found = (call.policy_version, call.weights_hash), (status.policy_version, status.weights_hash)
        if wanted != found:
            raise stale(self._server.url, wanted, found)
        self.policy_version, self.weights_hash = wanted

    def sample(
        self,
        requests: Sequence[Request],
        config: SamplingConfig,
        *,
        on_finish: OnFinish | None = None,
        follow: Follow | None = None,
    ) -> list[Completion]:
        """One completion per request, in the order of the requests; see `Sampler.sample`.

        Turn by turn: all requests that follow are sent together, and their prompts are computed as wholes.
        """
        if follow is None:
            return self._sample(requests, config, on_finish)
        return by_turns(lambda turn, tell: self._sample(turn, config, tell), requests, follow, on_finish)

    def _sample(
        self, requests: Sequence[Request], config: SamplingConfig, on_finish: OnFinish | None
    ) -> list[Completion]:
        finished: dict[int, Completion] = {}
        failures = 0
        while len(finished) < len(requests):
            missing = [index for index in range(len(requests)) if index not in finished]
            call = SampleCall([requests[i] for i in missing], config, self.policy_version, self.weights_hash)
            try:
                for line in self._server.lines("/sample", _CALL.dump_json(call)):
                    if "error" in line:
                        raise accord_error(line["error"])
                    index, completion = missing[line["index"]], _COMPLETION.validate_python(line["completion"])
                    finished[index], failures = completion, 0
                    if on_finish is not None:
                        on_finish(index, completion)
                if len(finished) < len(requests):
                    raise TransientError("the answer broke off")
            except TransientError as interruption:
                failures += 1
                if failures > self._server.config.retries:
                    raise self._server.failed("/sample", str(interruption), failures) from None
                self._server.pause(failures - 1)
        return [finished[index] for index in range(len(requests))]

    def _status(self, answer: object) -> Status:
        try:
            status = TypeAdapter(Status).validate_python(answer)
        except ValueError:
            status = None
        if status is None or status.engine != ENGINE:
            fix = "Start one with `accord sample-server`; for vLLM, use accord.sampling.http."
            raise SamplerError("This is no server of accord sample-server.", where=self._server.url, fix=fix)
        return status


_CALL = TypeAdapter(SampleCall)
_COMPLETION = TypeAdapter(Completion)


def stale(url: str, wanted: tuple[int, str], found: tuple[int, str]) -> StaleWeightsError:
    """The error for a server that has other weights than those that are wanted."""
    what = f"The sampler serves version {found[0]} ({found[1]}), not version {wanted[0]} ({wanted[1]})."
    fix = "Give it the weights again with `load`; another trainer may be using the same server."
    return StaleWeightsError(what, where=url, fix=fix)
