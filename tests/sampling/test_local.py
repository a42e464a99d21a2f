"""The sampler against two oracles: transformers' `generate` (greedy text) and the engine (log-probabilities)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from accord.engine.precision import autocast
from accord.errors import ConfigError, DataError
from accord.models.load import load_policy
from accord.models.packing import pack
from accord.models.render import Renderer, sampled_tree
from accord.models.tiny import save_tiny
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig, completion_seed, requests_for, uniforms
from accord.types import Message, Prompt

# GPT-2's linear layers are no nn.Linear; Gemma 2 has a soft cap and, like Mistral, a sliding window (16 tokens here).
# Heads of 16 are for compiled code: in the stack of layers (llama, mistral), or for attention alone.
WIDE = ["llama/16", "mistral/16", "qwen3/16", "gpt2/16"]
ARCHITECTURES = ["llama", "qwen3", "gpt2", "gemma2", "mistral", "phi", "mamba", *WIDE]

STOPS = frozenset(range(2, 20))


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Tiny random models, loaded as users load theirs, once per architecture."""
    loaded = {}

    def load(architecture):
        if architecture not in loaded:
            name, _, size = architecture.partition("/")
            settings = {} if not size else {"n_embd": 4 * int(size)} if name == "gpt2" else {"head_dim": int(size)}
            directory = save_tiny(tmp_path_factory.mktemp(name), name, **settings)
            loaded[architecture] = load_policy(str(directory))
        return loaded[architecture]

    return load


def some_requests(prompts=5, each=2, *, lengths=(3, 40), **settings):
    """Random prompts; ids 0 to 2 are special."""
    rng = np.random.default_rng(1)
    requests = []
    for number in range(prompts):
        ids = tuple(rng.integers(3, 259, rng.integers(*lengths)).tolist())
        requests += [Request(f"p{number}", ids, seed=100 * number + k, **settings) for k in range(each)]
    return requests


@contextmanager
def many_stops(policy):
    """Completions end after about 14 tokens, so that sequences leave, move and enter in every step."""
    usual = policy.model.generation_config.eos_token_id
    policy.model.generation_config.eos_token_id = sorted(STOPS)
    yield
    policy.model.generation_config.eos_token_id = usual


@contextmanager
def plain(policy):
    """The model with transformers' own attention."""
    usual = policy.model.config._attn_implementation
    if policy.branching:
        policy.model.set_attn_implementation("eager")
    yield policy.model
    if policy.branching:
        policy.model.set_attn_implementation(usual)


def engine_logprobs(policy, request, completion):
    """What the engine says of the tokens that were sampled."""
    batch = pack([sampled_tree(np.array(request.prompt_ids), [completion], (0,))], 1 << 20, branching=policy.branching)
    with torch.no_grad():
        return policy(batch[0]).logprobs_N.numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_that_of_generate(policies, architecture):
    """And the finished leave, the waiting enter: 3 slots serve 5 prompts."""
    policy = policies(architecture)
    requests = some_requests(each=1, temperature=0.0)
    config = SamplingConfig(max_new_tokens=24, max_batch=3)
    completions = LocalSampler(policy, "float32").sample(requests, config)
    with plain(policy) as model:
        for request, completion in zip(requests, completions, strict=True):
            expected = model.generate(
                torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=24, eos_token_id=2, pad_token_id=0
            )
            assert completion.token_ids == tuple(expected[0, len(request.prompt_ids) :].tolist())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_those_of_the_engine(policies, architecture):
    policy = policies(architecture)
    requests = some_requests(prompts=3, each=3)
    with many_stops(policy):
        completions = LocalSampler(policy, "float32").sample(requests, SamplingConfig(max_new_tokens=20, max_batch=4))
    assert len({len(completion.token_ids) for completion in completions}) > 2
    for request, completion in zip(requests, completions, strict=True):
        np.testing.assert_allclose(completion.raw_logprobs, engine_logprobs(policy, request, completion), atol=1e-4)
        np.testing.assert_allclose(completion.logprobs, completion.raw_logprobs, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "llama/16"])
def test_bfloat16_numbers_are_those_of_the_engine_up_to_its_own_rounding(policies, architecture):
    """Engine and sampler differ, on average, by no more than the engine in bfloat16 and in float32 do."""
    policy = policies(architecture)
    requests = some_requests(prompts=6, each=2)
    completions = LocalSampler(policy, "bfloat16").sample(requests, SamplingConfig(max_new_tokens=20))
    between, rounding = [], []
    for request, completion in zip(requests, completions, strict=True):
        exact = engine_logprobs(policy, request, completion)
        with autocast(policy.device, torch.bfloat16):
            engine = engine_logprobs(policy, request, completion)
        between.append(np.abs(engine - completion.raw_logprobs))
        rounding.append(np.abs(engine - exact))
    assert np.concatenate(between).mean() <= np.concatenate(rounding).mean()


@pytest.mark.parametrize("architecture", ["qwen3", "llama/16"])
def test_a_completion_does_not_depend_on_its_company(policies, architecture):
    sampler = LocalSampler(policies(architecture), "float32")
    with many_stops(sampler.policy):
        check_company(sampler, SamplingConfig(max_new_tokens=40))


def check_company(sampler, config):
    requests = [
        replace(
            request,
            temperature=(0.7, 1.3)[k % 2],
            top_p=(1.0, 0.8)[k // 2 % 2],
            top_k=(0, 20)[k // 4 % 2],
            min_p=(0.0, 0.05)[k // 3 % 2],
            logit_bias=({}, {40: 5.0, 41: -100.0})[k // 2 % 2],
            stop=((), ("C", "DE"))[k // 5 % 2],
            max_new_tokens=(None, 9)[k % 5 == 4],
        )
        for k, request in enumerate(some_requests(prompts=4, each=3))
    ]
    together = sampler.sample(requests, config)
    assert len({len(completion.token_ids) for completion in together}) > 5
    alone = [sampler.sample([request], config)[0] for request in requests]
    assert [completion.token_ids for completion in alone] == [completion.token_ids for completion in together]
    for slots in (1, 2, 5):
        crowded = sampler.sample(requests, config.model_copy(update={"max_batch": slots}))
        assert [completion.token_ids for completion in crowded] == [completion.token_ids for completion in together]
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = sampler.sample([requests[i] for i in order], config)
    assert [completion.token_ids for completion in shuffled] == [together[i].token_ids for i in order]


def test_tokens_follow_the_softmax(policies):
    """Chi-square of 4,000 first tokens against the exact distribution, temperature 0.5; false alarm: 1 in 10,000."""
    policy, count, temperature = policies("llama"), 4000, 0.5
    ids = (50, 60, 70, 80)
    requests = [Request("p", ids, completion_seed(3, "p", k), temperature) for k in range(count)]
    completions = LocalSampler(policy, "float32").sample(requests, SamplingConfig(max_new_tokens=1, max_batch=1000))
    with plain(policy) as model, torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    exact = torch.softmax(logits.double() / temperature, -1).numpy()
    observed = np.bincount([completion.token_ids[0] for completion in completions], minlength=len(exact))
    frequent = exact * count >= 5
    expected = np.append(exact[frequent], exact[~frequent].sum()) * count
    seen = np.append(observed[frequent], observed[~frequent].sum())
    assert frequent.sum() > 20
    assert stats.chisquare(seen, expected).pvalue > 1e-4
    first = completions[0]
    assert first.logprobs[0] == pytest.approx(np.log(exact[first.token_ids[0]]), abs=1e-4)


def test_stop_and_length(policies):
    """At a high temperature all 259 tokens are about equally likely, so a stop token ends some completions."""
    sampler = LocalSampler(policies("llama"), "float32")
    finished = {}
    completions = sampler.sample(
        some_requests(prompts=4, each=10, temperature=20.0),
        SamplingConfig(max_new_tokens=100),
        on_finish=finished.__setitem__,
    )
    assert [finished[index] for index in range(len(completions))] == completions
    assert {completion.stop_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        stopped = completion.stop_reason == "stop"
        assert (completion.token_ids[-1] == 2) == stopped
        assert 2 not in completion.token_ids[:-1]
        assert stopped or len(completion.token_ids) == 100
        assert len(completion.token_ids) == len(completion.logprobs) == len(completion.raw_logprobs)
        assert "<|im_end|>" not in completion.text


def test_every_stop_token_of_the_generation_settings_stops_and_stays_out_of_the_text(policies):
    policy = policies("llama")
    with many_stops(policy):
        completions = LocalSampler(policy, "float32").sample(some_requests(), SamplingConfig(max_new_tokens=200))
    for completion in completions:
        assert completion.stop_reason == "stop"
        assert completion.token_ids[-1] in STOPS
        assert not STOPS.intersection(completion.token_ids[:-1])
        assert completion.text == policy.tokenizer.decode(completion.token_ids[:-1], skip_special_tokens=True)


def test_a_request_has_settings_of_its_own(policies):
    sampler = LocalSampler(policies("llama"), "float32")
    plain = Request("p", (50, 60), seed=1)
    own = replace(plain, logit_bias={77: 100.0}, max_new_tokens=3)
    config = SamplingConfig(max_new_tokens=8, min_p=1.0)
    usual, forced, likely = sampler.sample([plain, own, replace(plain, min_p=0.0)], config)
    assert forced.token_ids == (77, 77, 77)
    assert forced.stop_reason == "length"
    assert forced.logprobs == pytest.approx((0.0,) * 3, abs=1e-6)
    assert max(forced.raw_logprobs) < -0.5
    assert usual.token_ids == sampler.sample([replace(plain, temperature=0.0)], config)[0].token_ids
    assert likely.token_ids != usual.token_ids


def test_every_token_is_told_as_it_is_sampled(policies):
    told = {}
    requests = some_requests(prompts=3, each=2)
    completions = LocalSampler(policies("llama"), "float32").sample(
        requests,
        SamplingConfig(max_new_tokens=5, max_batch=4),
        on_token=lambda index, token, logprob: told.setdefault(index, []).append((token, logprob)),
    )
    assert len(told) == len(requests)
    for index, completion in enumerate(completions):
        assert told[index] == list(zip(completion.token_ids, completion.logprobs, strict=True))


def test_a_completion_says_which_weights_it_is_from(policies):
    sampler = LocalSampler(policies("llama"), "float32")
    request = Request("p", (50, 60), seed=1, max_new_tokens=2)
    assert sampler.sample([request], SamplingConfig())[0].policy_version == 0
    sampler.load(7, policies("llama"))
    assert sampler.sample([request], SamplingConfig())[0].policy_version == 7


def test_requests_for_prompts(policies):
    policy = policies("llama")
    prompts = [Prompt("a", (Message("user", "Name a colour."),)), Prompt("b", "Once upon a")]
    requests = requests_for(prompts, Renderer(policy), (0.0, 1.0), seed=5)
    assert [(request.prompt_id, request.temperature) for request in requests] == [
        ("a", 0.0),
        ("a", 1.0),
        ("b", 0.0),
        ("b", 1.0),
    ]
    assert policy.tokenizer.decode(requests[0].prompt_ids).endswith("Name a colour.<|im_end|>\n<|im_start|>assistant\n")
    assert len({request.seed for request in requests}) == 4
    assert requests_for(prompts[1:], Renderer(policy), (0.0, 1.0), seed=5) == requests[2:]


def test_random_numbers_belong_to_the_seed_and_the_position():
    np.testing.assert_array_equal(uniforms(7, 100)[:10], uniforms(7, 10))
    assert not np.array_equal(uniforms(7, 10), uniforms(8, 10))


def test_the_network_is_left_as_it_was(policies):
    """Weights change between calls, as training changes them; modules and modes do not."""
    policy = policies("llama")
    request = Request("p", (5, 6, 7), seed=0, temperature=0.0)
    sampler = LocalSampler(policy, "bfloat16")
    policy.model.train()
    before = sampler.sample([request], SamplingConfig(max_new_tokens=8))
    assert policy.model.training
    assert not [name for name, module in policy.model.named_modules() if "forward" in vars(module)]
    weight = policy.model.get_input_embeddings().weight
    with torch.no_grad():
        weight.neg_()
    after = sampler.sample([request], SamplingConfig(max_new_tokens=8))
    with torch.no_grad():
        weight.neg_()
    policy.model.eval()
    assert before != after
    assert before == sampler.sample([request], SamplingConfig(max_new_tokens=8))


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request("p9", (5,) * 500, seed=0), DataError, "p9: 500 prompt tokens and 20 new ones are more than the 512"),
        (Request("p9", (), seed=0), DataError, "p9: This prompt has no tokens"),
        (Request("p9", (5,), seed=-1), ConfigError, "p9: seed = -1"),
        (Request("p9", (5,), seed=0, temperature=-1.0), ConfigError, "p9: temperature"),
        (Request("p9", (5,), seed=0, top_p=0.0), ConfigError, "p9: top_p"),
        (Request("p9", (5,), seed=0, min_p=1.5), ConfigError, "p9: min_p"),
        (Request("p9", (5,), seed=0, stop=("",)), ConfigError, "p9: stop"),
        (Request("p9", (5,), seed=0, max_new_tokens=0), ConfigError, "p9: max_new_tokens"),
        (Request("p9", (5,), seed=0, max_new_tokens=600), DataError, "p9: 1 prompt tokens and 600 new ones"),
        (Request("p9", (5,), seed=0, logit_bias={3: 101.0}), ConfigError, "p9: logit_bias"),
        (Request("p9", (5,), seed=0, logit_bias={400: 1.0}), ConfigError, "p9: Token 400 does not exist"),
        (Request("p9", (5, 259), seed=0), ConfigError, "p9: Token 259 does not exist"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is(policies, request_, error, message):
    finished = []
    with pytest.raises(error, match=message):
        LocalSampler(policies("llama"), "float32").sample(
            [Request("p1", (5, 6), seed=0), request_],
            SamplingConfig(max_new_tokens=20),
            on_finish=lambda *given: finished.append(given),
        )
    assert not finished


def test_no_request_no_completion(policies):
    assert LocalSampler(policies("llama"), "float32").sample([], SamplingConfig()) == []


def test_a_model_that_cannot_share_prompts_says_so(policies, capsys):
    LocalSampler(policies("mamba"), "float32")
    assert capsys.readouterr().err.count("\n") == 1
