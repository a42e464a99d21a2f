"""Servers that fail, lie, or speak text only; weights that do not arrive whole."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from accord.errors import ConfigError, MissingDataError, ModelError, ResourceError, SamplerError, StaleWeightsError
from accord.models.load import load_policy
from accord.models.lora import LoRAConfig, add_lora
from accord.models.tiny import save_tiny
from accord.sampling.connection import Connection, HTTPConfig
from accord.sampling.http import OpenAISampler, VLLMSampler, connect
from accord.sampling.local import LocalSampler
from accord.sampling.remote import LoadCall, RemoteSampler
from accord.sampling.request import Request, SamplingConfig, completion_seed
from accord.sampling.sampler import hash_weights
from accord.sampling.serve import SampleServer
from accord.types import Message, Prompt

CONFIG = SamplingConfig(max_new_tokens=6)
REQUESTS = [Request(f"p{k}", (30, 40 + k), seed=k) for k in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@contextmanager
def listening(server, run):
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        (server.close if isinstance(server, SampleServer) else server.shutdown)()
        thread.join()


@pytest.fixture
def server(model):
    with listening(own := SampleServer(str(model), precision="float32"), own.run):
        yield own


@contextmanager
def scripted(*answers):
    """A server that gives these answers in turn, then the last one again; `seen` lists (path, body, headers)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.rfile.read(int(self.headers["content-length"] or 0))
            seen.append((self.path, json.loads(content) if content else None, dict(self.headers)))
            status, body = answers[min(len(seen), len(answers)) - 1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        do_POST = do_GET

        def log_message(self, format, *args):
            """Silence."""

    seen = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with listening(http, http.serve_forever):
        yield f"http://127.0.0.1:{http.server_port}", seen


def config(url, **settings):
    return HTTPConfig(url=url, **{"retries": 3, **settings})


def test_what_fails_in_passing_is_repeated():
    with scripted((503, b"loading"), (429, {}), (200, {"fine": True})) as (url, seen):
        assert Connection(config(url)).post("/x", {"a": 1}) == {"fine": True}
        assert [body for _, body, _ in seen] == [{"a": 1}] * 3


def test_what_goes_on_failing_is_an_error_with_the_last_reason():
    with scripted((503, {"error": {"message": "no memory"}})) as (url, seen):
        with pytest.raises(SamplerError, match=r"status 503: no memory \(tried 2 times\)") as error:
            Connection(config(url, retries=1)).get("/x")
        assert len(seen) == 2
        assert error.value.where == f"{url}/x"


def test_a_refusal_is_not_repeated():
    with scripted((404, {"detail": "Not Found"})) as (url, seen):
        with pytest.raises(SamplerError, match=r"refuses this request: status 404.*Not Found"):
            Connection(config(url)).get("/x")
        assert len(seen) == 1


def test_a_server_that_is_silent_is_given_up():
    held = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self):
            held.wait(20)

        def log_message(self, format, *args):
            """Silence."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    with listening(http, http.serve_forever):
        with pytest.raises(SamplerError, match="timed out"):
            Connection(config(f"http://127.0.0.1:{http.server_port}", timeout=0.2, retries=0)).get("/x")
        held.set()


def test_an_answer_that_breaks_off_costs_only_what_was_missing(model, server):
    """Two completions, half a third one, the end of the connection: the other two are asked for again."""
    policy = load_policy(str(model))
    expected = LocalSampler(policy, "float32").sample(REQUESTS, CONFIG)
    real = RemoteSampler(config(server.url))
    status = Connection(config(server.url)).get("/status")
    lines = [json.dumps({"index": k, "completion": _row(expected[k])}).encode() + b"\n" for k in (2, 0, 1, 3)]
    rest = [json.dumps({"index": k, "completion": _row(expected[i])}).encode() + b"\n" for k, i in enumerate((1, 3))]
    broken = lines[0] + lines[1] + lines[2][:40]
    with scripted((200, status), (200, broken), (502, b""), (200, b"".join(rest))) as (url, seen):
        told = {}
        sampler = RemoteSampler(config(url))
        assert sampler.sample(REQUESTS, CONFIG, on_finish=told.__setitem__) == expected == real.sample(REQUESTS, CONFIG)
        assert [len(body["requests"]) for _, body, _ in seen[1:]] == [4, 2, 2]
        assert [body["prompt_id"] for body in seen[-1][1]["requests"]] == ["p1", "p3"]
        assert told == dict(enumerate(expected))


def _row(completion):
    return {name: getattr(completion, name) for name in completion.__dataclass_fields__}


def test_weights_that_are_not_those_that_were_sent_are_refused(model, server, tmp_path):
    """One number of one file changes on its way: the server says so, and goes on with what it had."""
    policy = load_policy(str(model))
    sampler = RemoteSampler(config(server.url, exchange=tmp_path / "exchange"))
    sampler.load(1, policy)
    before = sampler.sample(REQUESTS, CONFIG)
    with torch.no_grad():
        policy.model.model.norm.weight[0] += 1e-3
    policy.save(tmp_path / "sent")
    call = {"policy_version": 2, "weights_hash": sampler.weights_hash, "directory": str(tmp_path / "sent")}
    with pytest.raises(StaleWeightsError, match="not those that were sent"):
        Connection(config(server.url)).post("/load", {**call, "adapter": False})
    assert server.status.policy_version == 1
    assert sampler.sample(REQUESTS, CONFIG) == before


def test_a_directory_that_the_server_does_not_see(server, tmp_path):
    call = LoadCall(1, "", str(tmp_path / "nowhere"), adapter=False)
    with pytest.raises(MissingDataError, match="nowhere") as error:
        Connection(config(server.url)).post("/load", _row(call))
    assert "exchange" in error.value.fix


def test_adapters_travel_alone_and_are_told_apart(model, server, tmp_path):
    policy = load_policy(str(model))
    add_lora(policy, LoRAConfig(rank=2))
    exchange = tmp_path / "exchange"
    sampler = RemoteSampler(config(server.url, exchange=exchange))
    sampler.load(1, policy)
    plain = sampler.sample(REQUESTS, CONFIG)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    sampler.load(2, policy)
    assert sorted(path.name for path in exchange.iterdir()) == ["00000002"]
    assert (exchange / "00000002" / "adapter_model.safetensors").exists()
    adapted = sampler.sample(REQUESTS, CONFIG)
    expected = LocalSampler(policy, "float32").sample(REQUESTS, CONFIG)
    assert [each.token_ids for each in adapted] == [each.token_ids for each in expected]
    assert [each.token_ids for each in adapted] != [each.token_ids for each in plain]
    assert {each.policy_version for each in adapted} == {2}


def test_an_adapter_of_another_base_is_refused(server, tmp_path):
    policy = load_policy(str(save_tiny(tmp_path / "other", seed=1)))
    add_lora(policy, LoRAConfig(rank=2))
    with pytest.raises(StaleWeightsError, match="same base"):
        RemoteSampler(config(server.url, exchange=tmp_path / "exchange")).load(1, policy)


def test_the_hash_of_weights(model):
    """The same for the same weights; another for one number of one weight; a value head is no part of it."""
    one, two = load_policy(str(model)), load_policy(str(model))
    assert hash_weights(one) == hash_weights(two) == hash_weights(one, one.state())
    with_head = {**one.state(), "value_head.weight": torch.ones(1, 32)}
    assert hash_weights(one, with_head) == hash_weights(one)
    with torch.no_grad():
        two.model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-6
    assert hash_weights(one) != hash_weights(two)


@pytest.mark.parametrize(
    ("body", "message"),
    [({"requests": []}, r"/sample, SampleCall.config|/sample, config"), ([], "/sample, body")],
)
def test_a_call_that_cannot_be_read(server, body, message):
    with pytest.raises(ConfigError, match=message):
        Connection(config(server.url)).post("/sample", body)


def test_a_port_that_is_taken(server, model):
    with pytest.raises(ResourceError, match="Cannot listen"):
        SampleServer(str(model), port=int(server.url.rpartition(":")[2]))


def test_connect_finds_out_who_listens(server):
    assert isinstance(connect(config(server.url)), RemoteSampler)
    models = {"data": [{"id": "tiny"}]}
    with scripted((404, {}), (200, {"version": "0.32.0"}), (200, models)) as (url, _):
        assert isinstance(connect(config(url)), VLLMSampler)
    with scripted((404, {})) as (url, _), pytest.raises(SamplerError, match="text, not the tokens") as error:
        connect(config(url))
    assert "OpenAISampler" in error.value.fix


def test_a_server_without_token_ids_is_refused():
    answer = {"choices": [{"text": "Blue", "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5]}}]}
    with scripted((200, {"data": [{"id": "m"}]}), (200, answer)) as (url, _):
        sampler = VLLMSampler(config(url))
        with pytest.raises(SamplerError, match="neither token ids"):
            sampler.sample(REQUESTS[:1], CONFIG)


@pytest.mark.parametrize("answer", [{}, [], {"data": []}, {"data": [{}]}, b"<html>"])
def test_an_answer_of_another_kind(answer):
    with scripted((200, answer)) as (url, _), pytest.raises(SamplerError, match="answer") as error:
        VLLMSampler(config(url))
    assert "/v1/models" in error.value.where


def test_a_vllm_that_tells_only_the_models_logprobs_cannot_sample_in_another_shape():
    """With top_k = 1 the token it samples has log-probability 0 under the sampling distribution, and only there."""
    told = {"text": "B", "token_ids": [5], "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5]}}
    with scripted((200, {"data": [{"id": "m"}]}), (200, {"choices": [told]})) as (url, _):
        sampler = VLLMSampler(config(url))
        with pytest.raises(SamplerError, match="not those of the sampling distribution") as error:
            sampler.sample(REQUESTS[:1], CONFIG.model_copy(update={"temperature": 0.7}))
        assert "--logprobs-mode processed_logprobs" in error.value.fix
        assert sampler.sample(REQUESTS[:1], CONFIG)[0].logprobs == (-0.5,)


def test_text_from_any_openai_compatible_server(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    answers = [
        {"choices": [{"message": {"content": "Blue"}, "finish_reason": "stop"}]},
        {"choices": [{"text": " a time", "finish_reason": "length"}]},
    ]
    prompts = [Prompt("a", (Message("user", "Name a colour."),)), Prompt("b", "Once upon")]
    settings = SamplingConfig(max_new_tokens=6, top_p=0.9, stop=("\n",), logit_bias={7: 1.5})
    with scripted(*((200, answer) for answer in answers)) as (url, seen):
        sampler = OpenAISampler(config(url, concurrency=1, api_key_variable="A_KEY"), "m")
        blue, time = sampler.complete(prompts, [0.5], settings, seed=3)
    assert (blue.text, blue.stop_reason, time.text, time.stop_reason) == ("Blue", "stop", " a time", "length")
    assert blue.token_ids == blue.logprobs == blue.raw_logprobs == ()
    assert blue.seed == completion_seed(3, "a", 0)
    asked = {"model": "m", "max_tokens": 6, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "logit_bias": {"7": 1.5}}
    messages = [{"role": "user", "content": "Name a colour."}]
    assert seen[0][0:2] == ("/v1/chat/completions", {**asked, "seed": blue.seed, "messages": messages})
    assert seen[1][0:2] == ("/v1/completions", {**asked, "seed": time.seed, "prompt": "Once upon"})
    assert {headers["authorization"] for _, _, headers in seen} == {"Bearer secret"}


@pytest.mark.parametrize(("setting", "value"), [("top_k", 5), ("min_p", 0.1)])
def test_what_openais_interface_does_not_have_is_refused(setting, value):
    sampler = OpenAISampler(config("http://127.0.0.1:9"), "m")
    with pytest.raises(ConfigError, match=setting):
        sampler.complete([Prompt("b", "Once")], [1.0], SamplingConfig.build({setting: value}), seed=0)


def test_a_key_that_is_not_there():
    with pytest.raises(ConfigError, match="A_MISSING_KEY"):
        Connection(config("http://127.0.0.1:9", api_key_variable="A_MISSING_KEY"))


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "ftp://host", "http://"])
def test_an_address_that_is_none(url):
    with pytest.raises(ConfigError, match="url"):
        HTTPConfig.build({"url": url})


def test_a_model_that_cannot_be_served(tmp_path):
    with pytest.raises(ModelError, match="no model"):
        SampleServer(str(tmp_path))
