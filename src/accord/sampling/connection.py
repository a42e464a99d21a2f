"""A connection to a server that samples: timeouts, repetition of what failed in passing, errors that say what to do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
from pydantic import Field

from accord import errors
from accord.config import Config
from accord.errors import AccordError, ConfigError, SamplerError

__all__ = ["Connection", "HTTPConfig", "TransientError"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
"""Seconds before a request is repeated: doubled every time."""


class HTTPConfig(Config):
    """How a server that samples is reached."""

    url: str = Field(pattern=r"^https?://[^/\s]+")
    """Where it listens, e.g. http://127.0.0.1:8001."""
    timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds without an answer after which a request has failed."""
    retries: int = Field(8, ge=0)
    """A request that fails in passing (no connection, a status of 500 and above, 429) is repeated this many times."""
    concurrency: int = Field(64, gt=0)
    """Requests that wait for this server at the same time."""
    exchange: Path = Path("runs/exchange")
    """A directory that this process and the server both see: new weights go through it."""
    api_key_variable: str | None = None
    """The environment variable that holds the server's key, if it asks for one."""


class TransientError(Exception):
    """A request failed in passing; the message says how."""


class Connection:
    """Talks JSON to one server. Threads may share it."""

    def __init__(self, config: HTTPConfig) -> None:
        """
        Raises:
            ConfigError: the variable of the key is not set.
        """
        self.config, self.url = config, config.url.rstrip("/")
        limits = httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        timeout = httpx2.Timeout(config.timeout, connect=min(config.timeout, 10.0))
        self._client = httpx2.Client(base_url=self.url, headers=_headers(config), limits=limits, timeout=timeout)

    def has(self, path: str) -> bool:
        """Whether a GET of this path is answered.

        Raises:
            SamplerError: the server cannot be reached.
        """
        return self._send("GET", path, None).status_code < 300

    def get(self, path: str, *, fix: str | None = None) -> Any:
        """The JSON that a GET answers; see `post`."""
        return self._read(self._send("GET", path, None), path, fix)

    def post(self, path: str, body: Any, *, fix: str | None = None) -> Any:
        """The JSON that a POST of this JSON answers (None for an empty answer).

        Args:
            fix: the advice, if the server refuses.

        Raises:
            SamplerError: the server cannot be reached or refuses; `accord sample-server` says with which error.
        """
        return self._read(self._send("POST", path, body), path, fix)

    def tell(self, path: str, body: Any, *, fix: str | None = None) -> None:
        """A POST of this JSON, whose answer says no more than that it was done; see `post`."""
        response = self._send("POST", path, body)
        if response.status_code >= 300:
            raise self._refused(response, path, fix)

    def lines(self, path: str, body: bytes) -> Iterator[Any]:
        """The JSON lines that a POST answers, as they come. Not repeated.

        Raises:
            TransientError: the connection or the server failed; the lines so far are good.
            SamplerError: the server refuses.
        """
        headers = {"content-type": "application/json"}
        try:
            with self._client.stream("POST", path, content=body, headers=headers) as response:
                if response.status_code != 200:
                    response.read()
                    raise (
                        TransientError(_reason(response)) if _passing(response) else self._refused(response, path, None)
                    )
                for line in response.iter_lines():
                    if line:
                        yield json.loads(line)
        except httpx2.TransportError as error:
            raise TransientError(_describe(error)) from None
        except json.JSONDecodeError:
            raise TransientError("the answer broke off") from None

    def failed(self, path: str, reason: str, attempts: int) -> SamplerError:
        """The error for a request that failed in passing too often."""
        times = "once" if attempts == 1 else f"{attempts} times"
        what = f"The server does not answer: {reason} (tried {times})."
        fix = f"Start it (accord sample-server, or vLLM), or correct the url; is {self.url} what it listens on?"
        return SamplerError(what, where=f"{self.url}{path}", fix=fix)

    def pause(self, attempt: int) -> None:
        """Wait before the next attempt."""
        time.sleep(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE))

    def _send(self, method: str, path: str, body: Any) -> httpx2.Response:
        """What the server answers, be it a refusal."""
        for attempt in range(self.config.retries + 1):
            try:
                response = self._client.request(method, path, json=body)
                if not _passing(response):
                    return response
                reason = _reason(response)
            except httpx2.TransportError as error:
                reason = _describe(error)
            if attempt < self.config.retries:
                self.pause(attempt)
        raise self.failed(path, reason, self.config.retries + 1)

    def _read(self, response: httpx2.Response, path: str, fix: str | None) -> Any:
        if response.status_code >= 300:
            raise self._refused(response, path, fix)
        try:
            return response.json() if response.content.strip() else None
        except ValueError:
            raise SamplerError("The answer is no JSON.", where=f"{self.url}{path}", fix=_WRONG_SERVER) from None

    def _refused(self, response: httpx2.Response, path: str, fix: str | None) -> AccordError:
        error = _error(response)
        if "kind" in error:
            return accord_error(error)
        what = f"The server refuses this request: {_reason(response)}."
        return SamplerError(what, where=f"{self.url}{path}", fix=fix or _WRONG_SERVER)


_WRONG_SERVER = "Check that the url is that of the server you mean; its own log says more."


def accord_error(answer: dict[str, Any]) -> AccordError:
    """The error that `accord sample-server` reports, as the class that it was there."""
    kind = getattr(errors, str(answer.get("kind")), SamplerError)
    kind = kind if isinstance(kind, type) and issubclass(kind, AccordError) else SamplerError
    error: AccordError = kind(str(answer.get("what")), where=answer.get("where"), fix=answer.get("fix"))
    return error


def _error(response: httpx2.Response) -> dict[str, Any]:
    """What an answer says under `error`, as OpenAI's interface and ours do; empty if it says nothing."""
    try:
        answer = response.json()
    except ValueError:
        return {}
    error = answer.get("error") if isinstance(answer, dict) else None
    return error if isinstance(error, dict) else {}


def _reason(response: httpx2.Response) -> str:
    message = str(_error(response).get("message") or response.text.strip()[:300])
    return f"status {response.status_code}{': ' if message else ''}{message}"


def _passing(response: httpx2.Response) -> bool:
    """Whether the same request may succeed later."""
    return response.status_code >= 500 or response.status_code == 429


def _describe(error: httpx2.TransportError) -> str:
    return str(error) or type(error).__name__


def _headers(config: HTTPConfig) -> dict[str, str]:
    if config.api_key_variable is None:
        return {}
    key = os.environ.get(config.api_key_variable)
    if not key:
        fix = "Set it to the server's key, or leave api_key_variable out."
        raise ConfigError("This environment variable is not set.", where=config.api_key_variable, fix=fix)
    return {"authorization": f"Bearer {key}"}
