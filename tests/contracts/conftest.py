"""The samplers that one contract holds for: in this process, our servers, vLLM where it is installed, and its stand-in.

The stand-in speaks vLLM's interface over our engine, so that its client is tested where vLLM is not installed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord.models.load import load_policy
from accord.models.network import Policy
from accord.models.packing import pack
from accord.models.tiny import save_tiny
from accord.models.trees import Branch, Tree
from accord.sampling.connection import Connection, HTTPConfig
from accord.sampling.http import VLLMSampler
from accord.sampling.local import LocalSampler
from accord.sampling.pool import PoolSampler
from accord.sampling.remote import RemoteSampler
from accord.sampling.replica import Replica
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.sampler import Sampler
from accord.sampling.serve import SampleServer

REPOSITORY = Path(__file__).resolve().parents[2]
VLLM_ENGINE = {"llama": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}}
"""vLLM's kernels want heads of 32 and more."""


@dataclass(frozen=True)
class Engine:
    """A sampler under test, with what holds for it.

    `exact`: in our own numbers: same seed, same tokens, in any company. `bound`: how far log-probabilities may be from
    the engine's forward pass: 1e-4 in float32; vLLM (in float32, too) sums in other orders, in other kernels.
    """

    name: str
    sampler: Sampler
    policy: Policy
    exact: bool
    bound: float
    second: Callable[[], Sampler] | None
    """Another client of the same server."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama", **VLLM_ENGINE["llama"])


@pytest.fixture(params=["local", "replica", "server", "pool", "stand-in", "vllm"], scope="module")
def engine(request, model, tmp_path_factory) -> Iterator[Engine]:
    policy = load_policy(str(model))
    exchange = tmp_path_factory.mktemp("exchange")

    def config(url: str, name: str = "first") -> HTTPConfig:
        return HTTPConfig(url=url, retries=1, exchange=exchange / name)

    if request.param == "local":
        yield Engine("local", LocalSampler(policy, "float32"), policy, exact=True, bound=1e-4, second=None)
    elif request.param == "replica":
        yield Engine("replica", Replica(policy, "float32"), policy, exact=True, bound=1e-4, second=None)
    elif request.param == "pool":
        with running(SampleServer(str(model), precision="float32")) as url:
            sampler = PoolSampler([lambda: url], exchange)
            yield Engine("pool", sampler, policy, exact=True, bound=1e-4, second=None)
    elif request.param == "server":
        with running(SampleServer(str(model), precision="float32")) as url:
            sampler, other = RemoteSampler(config(url)), lambda: RemoteSampler(config(url, "second"))
            yield Engine("server", sampler, policy, exact=True, bound=1e-4, second=other)
    elif request.param == "stand-in":
        with running(StandIn(model)) as url:
            sampler, other = VLLMSampler(config(url)), lambda: VLLMSampler(config(url, "second"))
            yield Engine("stand-in", sampler, policy, exact=True, bound=1e-4, second=other)
    else:
        with vllm(model, tmp_path_factory.mktemp("log")) as url:
            sampler, other = VLLMSampler(config(url)), lambda: VLLMSampler(config(url, "second"))
            yield Engine("vllm", sampler, policy, exact=False, bound=1e-3, second=other)


class running:  # noqa: N801
    """A server in a thread of its own."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def __enter__(self) -> str:
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        return self.server.url

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.thread.join()


class vllm:  # noqa: N801
    """A vLLM server in a process of its own; skips where it is not installed."""

    def __init__(self, model: Path, logs: Path, *, lora: bool = False) -> None:
        self.model, self.logs, self.lora = model, logs, lora

    def __enter__(self) -> str:
        python = Path(os.environ.get("ACCORD_VLLM_PYTHON", REPOSITORY / ".venv-vllm" / "bin" / "python"))
        if not python.exists():
            pytest.skip("vLLM is not installed: make .venv-vllm, or set ACCORD_VLLM_PYTHON to a Python that has it")
        port = free_port()
        command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"),
            *("--enforce-eager", "--logprobs-mode", "processed_logprobs"),
        ]
        settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        if self.lora:
            command.append("--enable-lora")
            settings["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with (self.logs / "vllm.log").open("w") as log:
            self.process = subprocess.Popen(command, env={**kept, **settings}, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        Connection(HTTPConfig(url=url, retries=20)).get("/version")  # about two minutes
        return url

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class StandIn(ThreadingHTTPServer):
    """vLLM 0.32's interface, as far as it is used, started with --logprobs-mode processed_logprobs."""

    daemon_threads = True

    def __init__(self, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), _StandInHandler)
        self.url, self.run = f"http://127.0.0.1:{self.server_port}", self.serve_forever
        self.sampler, self.version = LocalSampler(load_policy(str(model)), "float32"), "default"
        self.busy = threading.Lock()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if len(body["prompt"]) + body["max_tokens"] > self.sampler.policy.context:
            raise ValueError("This model's maximum context length is exceeded.")
        names = ("temperature", "top_p", "top_k", "min_p", "logit_bias")
        given = {name: body[name] for name in names if name in body}
        config = SamplingConfig.build({**given, "stop": body.get("stop", ()), "max_new_tokens": body["max_tokens"]})
        request = Request("p", tuple(body["prompt"]), body.get("seed", 0))
        completion = self.sampler.sample([request], config)[0]
        greedy = config.temperature == 0
        told = completion.raw_logprobs if greedy else completion.logprobs
        choice: dict[str, Any] = {"text": completion.text, "finish_reason": completion.stop_reason}
        if body.get("return_token_ids"):
            choice["token_ids"] = completion.token_ids
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": told}
        if "prompt_logprobs" in body:
            prompt = np.array(body["prompt"])
            said = forward(self.sampler.policy, prompt[:1], prompt[1:])
            pairs = zip(prompt[1:].tolist(), said.tolist(), strict=True)
            choice["prompt_logprobs"] = [None, *({str(token): {"logprob": value}} for token, value in pairs)]
        return {"choices": [choice]}


class _StandInHandler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        known = {
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/weight_info": {"weight_version": self.server.version},
        }
        self.answer(200, known[self.path]) if self.path in known else self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"] or 0))
        body = json.loads(content) if content else {}
        with self.server.busy:
            if self.path == "/v1/completions":
                try:
                    self.answer(200, self.server.complete(body))
                except ValueError as error:
                    self.answer(400, {"error": {"message": str(error), "code": 400}})
            elif self.path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                self.server.sampler.load(0, load_policy(body["kwargs"]["weights_path"]))
                self.answer(200, {"results": [None]})
            elif self.path == "/update_weight_version":
                self.server.version = body["new_version"]
                self.answer(200, {"success": True})
            else:
                self.answer(200 if self.path == "/reset_prefix_cache" else 404, {})

    def answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


def forward(policy: Policy, prompt: Sequence[int], *completions: Sequence[int]) -> np.ndarray:
    """What the training engine's forward pass says of completions of a prompt: a log-probability per token."""
    branches = tuple(Branch(np.array(each), np.ones(len(each), dtype=bool)) for each in completions)
    with torch.no_grad():
        return policy(pack([Tree(np.array(prompt), branches, (0,) * len(branches))], 1 << 20)[0]).logprobs_N.numpy()


@pytest.fixture(scope="session")
def engine_logprobs() -> Callable[..., np.ndarray]:
    return forward


@pytest.fixture
def vllm_with_adapters(model, tmp_path) -> Iterator[HTTPConfig]:
    with vllm(model, tmp_path, lora=True) as url:
        yield HTTPConfig(url=url, retries=1, exchange=tmp_path / "exchange")


@pytest.fixture
def unused_url() -> str:
    return f"http://127.0.0.1:{free_port()}"
