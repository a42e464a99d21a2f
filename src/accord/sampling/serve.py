"""`accord sample-server`: the local engine behind HTTP, for rollouts in another process or on another machine.

GET /status, POST /load, POST /sample: the calls are those of `accord.sampling.remote`. One call is computed at a time
(its completions fill the batch); others wait. There is no password: let it listen where only the trainer can reach it.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from accord.engine.precision import Precision
from accord.errors import AccordError, ConfigError, MissingDataError, ModelError, ResourceError, StaleWeightsError
from accord.models.load import load_policy
from accord.models.network import Policy
from accord.sampling.local import LocalSampler
from accord.sampling.remote import ENGINE, LoadCall, SampleCall, Status, stale
from accord.sampling.sampler import hash_weights
from accord.types import Completion

__all__ = ["SampleServer"]

_SIGN_OF_LIFE = 5.0
"""Seconds after which an empty line says that the server is still at work."""
_LARGEST_BODY = 1 << 30


class SampleServer:
    """Serves a policy.

    Attributes:
        url: where it listens.
    """

    def __init__(self, model: str, *, host: str = "127.0.0.1", port: int = 0, precision: Precision = "auto") -> None:
        """Load the model and open the port (0: any free one); `run` answers.

        Raises:
            ModelError: the model cannot be loaded.
            ResourceError: the port is taken.
        """
        self._sampler = LocalSampler(load_policy(model), precision)
        self._status = Status(ENGINE, model, 0, self._sampler.weights_hash)
        self._busy = threading.Lock()
        try:
            self._http = _Server((host, port), _Handler)
        except OSError as error:
            fix = "Choose another one with --port."
            raise ResourceError(f"Cannot listen: {error.strerror}.", where=f"{host}:{port}", fix=fix) from None
        self._http.owner = self
        self.url = f"http://{host}:{self._http.server_port}"

    def run(self) -> None:
        """Answer until `close`."""
        self._http.serve_forever()

    def close(self) -> None:
        """Let `run` end, and free the port."""
        self._http.shutdown()
        self._http.server_close()

    @property
    def status(self) -> Status:
        return self._status

    def load(self, call: LoadCall) -> Status:
        """Serve the weights of a directory, if they are those that were sent.

        Raises:
            StaleWeightsError: they hash to something else; the server goes on with those that it had.
            ModelError, MissingDataError: the directory holds no model.
        """
        if not Path(call.directory).is_dir():
            fix = "The server must see the directory `exchange` under the same path: share it, or set another one."
            raise MissingDataError("The server finds no such directory.", where=call.directory, fix=fix)
        with self._busy:
            policy = self._with_adapter(call.directory) if call.adapter else load_policy(call.directory)
            found = hash_weights(policy)
            if found != call.weights_hash:
                what = f"These weights hash to {found}, not to {call.weights_hash}: they are not those that were sent."
                fix = (
                    "Is the directory `exchange` another trainer's, too? With LoRA: does the server have the same base?"
                )
                raise StaleWeightsError(what, where=call.directory, fix=fix)
            self._sampler.load(call.policy_version, policy)
            self._status = Status(ENGINE, self._status.model, call.policy_version, found)
        return self._status

    def sample(self, call: SampleCall, reply: _Reply) -> None:
        """Write completions as they are finished.

        Raises:
            StaleWeightsError: the call wants other weights than the server has.
        """
        while not self._busy.acquire(timeout=_SIGN_OF_LIFE):
            reply.alive()
        try:
            wanted, found = (
                (call.policy_version, call.weights_hash),
                (self._status.policy_version, self._status.weights_hash),
            )
            if wanted != found:
                raise stale(self.url, wanted, found)
            self._sampler.sample(call.requests, call.config, on_finish=reply.completion, on_token=reply.alive)
        finally:
            self._busy.release()

    def _with_adapter(self, directory: str) -> Policy:
        """The model that the server was started with, under the adapter of this directory."""
        import peft  # imported here because it takes a second

        policy = load_policy(self._status.model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
                policy.adapter = peft.PeftModel.from_pretrained(policy.model, directory, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            message = str(error).strip().splitlines()[0]
            fix = "Start the server with the base model that is trained."
            raise ModelError(f"Cannot load this adapter: {message}", where=directory, fix=fix) from None
        return policy


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    owner: SampleServer


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/status":
            self._answer(200, TypeAdapter(Status).dump_python(self.server.owner.status))
        else:
            self._answer(404, {"error": {"message": "known: GET /status, POST /load, POST /sample"}})

    def do_POST(self) -> None:
        reply = _Reply(self)
        try:
            if self.path == "/load":
                status = self.server.owner.load(self._body(LoadCall))
                self._answer(200, TypeAdapter(Status).dump_python(status))
            elif self.path == "/sample":
                self.server.owner.sample(self._body(SampleCall), reply)
                reply.end()
            else:
                self.do_GET()
        except AccordError as error:
            answer = {
                "error": {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
            }
            if reply.begun:
                reply.line(answer)
            else:
                self._answer(409 if isinstance(error, StaleWeightsError) else 400, answer)
        except ConnectionError:
            self.close_connection = True  # the client left; what it asked for is not computed further

    def log_message(self, format: str, *args: object) -> None:
        """No line per request: a run makes many thousands."""

    def _body(self, kind: type[Any]) -> Any:
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > _LARGEST_BODY:
            fix = "Send fewer requests in one call."
            raise ConfigError(f"A body of {length or 'unknown'} bytes.", where=f"POST {self.path}", fix=fix)
        try:
            return TypeAdapter(kind).validate_json(self.rfile.read(int(length)))
        except ValidationError as error:
            first = error.errors()[0]
            where = f"POST {self.path}, {'.'.join(map(str, first['loc'])) or 'body'}"
            fix = "Use a client of the same version as the server."
            raise ConfigError(f"{first['msg']}.", where=where, fix=fix) from None

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Reply:
    """The lines of one answer."""

    def __init__(self, handler: _Handler) -> None:
        self._handler, self._last, self.begun = handler, time.monotonic(), False

    def completion(self, index: int, completion: Completion) -> None:
        self.line({"index": index, "completion": TypeAdapter(Completion).dump_python(completion)})

    def alive(self, *_: object) -> None:
        """An empty line, if there has been none for a while: the client's time-out begins anew."""
        if time.monotonic() - self._last > _SIGN_OF_LIFE:
            self._write(b"\n")

    def end(self) -> None:
        """Also an answer without completions is one."""
        self._write(b"\n")

    def line(self, value: object) -> None:
        self._write(json.dumps(value).encode() + b"\n")

    def _write(self, content: bytes) -> None:
        if not self.begun:
            self.begun = True
            self._handler.send_response(200)
            self._handler.send_header("content-type", "application/x-ndjson")
            self._handler.end_headers()
        self._handler.wfile.write(content)
        self._last = time.monotonic()
