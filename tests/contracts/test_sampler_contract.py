"""What holds for every sampler, whatever computes it and wherever it runs."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

from accord.errors import AccordError, ConfigError, DataError, SamplerError, StaleWeightsError
from accord.models.load import load_policy
from accord.models.lora import LoRAConfig, add_lora
from accord.sampling.connection import Connection, HTTPConfig
from accord.sampling.http import VLLMSampler, connect
from accord.sampling.local import LocalSampler
from accord.sampling.remote import RemoteSampler
from accord.sampling.request import Request, SamplingConfig
from accord.sampling.sampler import hash_weights

CONFIG = SamplingConfig(max_new_tokens=16)


def some_requests(prompts=4, each=3, **settings):
    rng = np.random.default_rng(3)
    requests = []
    for number in range(prompts):
        ids = tuple(rng.integers(3, 259, rng.integers(3, 30)).tolist())
        requests += [Request(f"p{number}", ids, seed=100 * number + k, **settings) for k in range(each)]
    return requests


@pytest.fixture
def restored(engine):
    """A test that loads other weights leaves the first ones behind."""
    yield
    engine.sampler.load(0, engine.policy)


def changed(model, amount):
    """Other weights than the model's, in one layer, by this share."""
    other = load_policy(str(model))
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight.mul_(1 + amount)
    return other


def tokens(completions):
    return [completion.token_ids for completion in completions]


def expected_logprobs(engine, request, completion, config, engine_logprobs):
    """Of the sampling distribution: shaped from the engine's whole distribution with numpy, token by token."""
    policy, expected = engine.policy, []
    every = [[token] for token in range(259)]
    for place, token in enumerate(completion.token_ids):
        before = [*request.prompt_ids, *completion.token_ids[:place]]
        raw = engine_logprobs(policy, before, *every).astype(np.float64)
        for biased, number in config.logit_bias.items():
            raw[biased] += number
        shaped = raw / config.temperature
        if config.top_k:
            shaped[shaped < np.sort(shaped)[-config.top_k]] = -np.inf
        if config.min_p:
            shaped[shaped < shaped.max() + np.log(config.min_p)] = -np.inf
        expected.append(shaped[token] - np.logaddexp.reduce(shaped))
    return expected


def test_logprobs_are_those_of_the_training_engine(engine, engine_logprobs):
    requests = some_requests()
    for request, completion in zip(requests, engine.sampler.sample(requests, CONFIG), strict=True):
        assert len(completion.token_ids) == len(completion.logprobs) == len(completion.raw_logprobs) > 0
        said = engine_logprobs(engine.policy, request.prompt_ids, completion.token_ids)
        np.testing.assert_allclose(completion.raw_logprobs, said, atol=engine.bound)
        np.testing.assert_allclose(completion.logprobs, said, atol=engine.bound)


@pytest.mark.parametrize(
    "shape",
    [
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.5, "min_p": 0.05},
        {"logit_bias": {60: 4.0, 61: -100.0}},
    ],
    ids=str,
)
def test_both_kinds_of_logprobs_under_shaping(engine, engine_logprobs, shape):
    """Of the distribution that was sampled from, and of the model."""
    config = SamplingConfig(max_new_tokens=3, **shape)
    requests = some_requests(prompts=2, each=1)
    for request, completion in zip(requests, engine.sampler.sample(requests, config), strict=True):
        said = engine_logprobs(engine.policy, request.prompt_ids, completion.token_ids)
        np.testing.assert_allclose(completion.raw_logprobs, said, atol=engine.bound)
        wanted = expected_logprobs(engine, request, completion, config, engine_logprobs)
        np.testing.assert_allclose(completion.logprobs, wanted, atol=3 * engine.bound)


def test_greedy_takes_the_most_likely_token(engine, engine_logprobs):
    requests = some_requests(prompts=2, each=1, temperature=0.0, max_new_tokens=4)
    for request, completion in zip(requests, engine.sampler.sample(requests, CONFIG), strict=True):
        for place, raw in enumerate(completion.raw_logprobs):
            before = [*request.prompt_ids, *completion.token_ids[:place]]
            best = engine_logprobs(engine.policy, before, *([token] for token in range(259))).max()
            assert raw == pytest.approx(best, abs=engine.bound)
        assert completion.logprobs == (0.0,) * len(completion.token_ids)


def test_a_seed_decides_the_tokens(engine):
    """One request at a time: what vLLM draws may depend on the company."""
    requests = some_requests(prompts=1, each=4)
    alone = [tokens(engine.sampler.sample([request], CONFIG))[0] for request in requests]
    assert len(set(alone)) == 4
    assert [tokens(engine.sampler.sample([request], CONFIG))[0] for request in requests] == alone


def test_the_same_seed_gives_the_same_tokens_in_any_company(engine):
    if not engine.exact:
        pytest.skip(f"{engine.name} draws its random numbers by batch")
    requests = some_requests()
    together = tokens(engine.sampler.sample(requests, CONFIG))
    assert len(set(together)) == len(requests)
    assert tokens(engine.sampler.sample(requests, CONFIG)) == together
    assert [tokens(engine.sampler.sample([request], CONFIG))[0] for request in requests] == together
    assert tokens(engine.sampler.sample(requests[::-1], CONFIG.model_copy(update={"max_batch": 5}))) == together[::-1]
    assert tokens(LocalSampler(engine.policy, "float32").sample(requests, CONFIG)) == together


def test_stop_tokens_and_lengths_end_completions(engine):
    """With a bias for the stop token, about half of the completions reach it."""
    engine.sampler.load(0, engine.policy)
    requests = some_requests(each=6, logit_bias={2: 3.0}, temperature=2.0)
    completions = engine.sampler.sample(requests, CONFIG)
    assert {completion.stop_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        stopped = completion.stop_reason == "stop"
        assert (completion.token_ids[-1] == 2) == stopped
        assert 2 not in completion.token_ids[:-1]
        assert stopped or len(completion.token_ids) == 16
        spoken = completion.token_ids[:-1] if stopped else completion.token_ids
        assert completion.text == engine.policy.tokenizer.decode(spoken, skip_special_tokens=True)


def test_stop_strings_end_completions_and_stay_out_of_the_text(engine):
    """Two letters are two tokens: the bias makes the pair frequent."""
    engine.sampler.load(0, engine.policy)
    ids = engine.policy.tokenizer.encode("ab")
    requests = some_requests(each=6, logit_bias=dict.fromkeys(ids, 6.0), stop=("ab",))
    completions = engine.sampler.sample(requests, CONFIG)
    stopped = [completion for completion in completions if completion.token_ids[-2:] == tuple(ids)]
    assert len(stopped) > 5
    for completion in completions:
        text = engine.policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert ("ab" in text) == (completion in stopped)
        if completion in stopped:
            assert completion.stop_reason == "stop"
            assert completion.text + "ab" == text


def test_what_is_finished_is_told(engine):
    told = {}
    completions = engine.sampler.sample(some_requests(), CONFIG, on_finish=told.__setitem__)
    assert [told[index] for index in range(len(completions))] == completions


def test_a_request_may_follow_another(engine, engine_logprobs):
    """Two more turns behind every completion; of the last one, log-probabilities are those behind all that was said."""
    requests, last, finished = some_requests(2, 2), {}, {}

    def follow(index, completion):
        asked = last.get(index, (0, requests[index]))
        future = Future()
        if asked[0] == 2:
            future.set_result(None)
        else:
            ids = (*asked[1].prompt_ids, *completion.token_ids, 30 + index, 40)
            last[index] = asked[0] + 1, replace(asked[1], prompt_ids=ids, seed=7 + asked[0], max_new_tokens=5)
            future.set_result(last[index][1])
        return future

    completions = engine.sampler.sample(requests, CONFIG, on_finish=finished.__setitem__, follow=follow)
    assert finished == dict(enumerate(completions))
    for index, completion in enumerate(completions):
        turn, request = last[index]
        assert turn == 2
        assert completion.seed == 8
        assert 0 < len(completion.token_ids) <= 5
        said = engine_logprobs(engine.policy, request.prompt_ids, completion.token_ids)
        np.testing.assert_allclose(completion.raw_logprobs, said, atol=engine.bound)


def test_no_request_no_completion(engine):
    assert engine.sampler.sample([], CONFIG) == []


@pytest.mark.usefixtures("restored")
def test_new_weights_are_sampled_from_under_their_version(engine, model, engine_logprobs):
    other, requests = changed(model, 2.0), some_requests(prompts=2)
    before = engine.sampler.sample(requests, CONFIG)
    engine.sampler.load(5, other)
    assert (engine.sampler.policy_version, engine.sampler.weights_hash) == (5, hash_weights(other))
    after = engine.sampler.sample(requests, CONFIG)
    assert {completion.policy_version for completion in after} == {5}
    assert [each.token_ids for each in before] != [each.token_ids for each in after]
    for request, completion in zip(requests, after, strict=True):
        said = engine_logprobs(other, request.prompt_ids, completion.token_ids)
        np.testing.assert_allclose(completion.raw_logprobs, said, atol=engine.bound)


@pytest.mark.usefixtures("restored")
def test_a_sampler_that_serves_other_weights_is_refused(engine, model):
    if engine.second is None:
        pytest.skip("it has no weights but those that its trainer gives it")
    engine.sampler.load(1, engine.policy)
    other = engine.second()
    other.load(1, changed(model, 1e-6))  # the same version: only the hash tells them apart
    finished = []
    with pytest.raises(StaleWeightsError) as error:
        engine.sampler.sample(some_requests(), CONFIG, on_finish=lambda *given: finished.append(given))
    assert error.value.where
    assert error.value.fix
    assert not finished


def test_vllm_samples_from_adapters(vllm_with_adapters, model, engine_logprobs):
    """One under every version, in the place of the one before; once it is gone, the sampler is refused."""
    sampler, server = VLLMSampler(vllm_with_adapters), Connection(vllm_with_adapters)
    policy, requests, said = load_policy(str(model)), some_requests(prompts=2), []
    add_lora(policy, LoRAConfig(rank=8))
    for version in (1, 2):
        with torch.no_grad():
            for name, weight in policy.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.2, generator=torch.Generator().manual_seed(version))
        sampler.load(version, policy)
        completions = sampler.sample(requests, CONFIG)
        for request, completion in zip(requests, completions, strict=True):
            raw = engine_logprobs(policy, request.prompt_ids, completion.token_ids)
            np.testing.assert_allclose(completion.raw_logprobs, raw, atol=1e-3)
            assert completion.policy_version == version
        said.append(tokens(completions))
    assert said[0] != said[1]
    (name,) = [each["id"] for each in server.get("/v1/models")["data"] if each["id"].startswith("accord-")]
    server.tell("/v1/unload_lora_adapter", {"lora_name": name})
    with pytest.raises(StaleWeightsError, match="no such adapter"):
        sampler.sample(requests, CONFIG)


@pytest.mark.parametrize(
    ("wrong", "kinds", "message"),
    [
        ({"seed": -1}, (ConfigError,), "p9: seed = -1"),
        ({"min_p": 2.0}, (ConfigError,), "p9: min_p"),
        ({"prompt_ids": ()}, (DataError,), "p9: This prompt has no tokens"),
        ({"prompt_ids": (5,) * 600}, (DataError, SamplerError), "600 prompt tokens|maximum context length"),
    ],
    ids=["seed", "setting", "empty", "long"],
)
def test_what_cannot_be_sampled_is_refused_with_the_reason(engine, wrong, kinds, message):
    request = replace(Request("p9", (5, 6), seed=0), **wrong)
    with pytest.raises(AccordError, match=message) as error:
        engine.sampler.sample([request], CONFIG)
    assert isinstance(error.value, kinds)
    assert error.value.fix


@pytest.mark.parametrize("kind", [RemoteSampler, VLLMSampler, connect])
def test_a_server_that_is_not_there(kind, unused_url):
    with pytest.raises(SamplerError, match="does not answer") as error:
        kind(HTTPConfig(url=unused_url, retries=0))
    assert unused_url in (error.value.where or "")
    assert "accord sample-server" in (error.value.fix or "")
