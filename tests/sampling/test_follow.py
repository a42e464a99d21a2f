"""Requests that follow others: with what was kept of a turn, the next one is what it would be anew."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from accord.models.load import load_policy
from accord.models.tiny import save_tiny
from accord.sampling import local
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig

# GPT-2 has no rotary positions, Gemma 2 a soft cap and, like Mistral, a sliding window (16 tokens here), DeepSeek has
# values narrower than keys; Mamba computes everything anew. Heads of 16 are of the size that compiled code takes.
ARCHITECTURES = ["llama", "llama-16", "gpt2", "gemma2", "mistral-16", "deepseek_v3", "mamba"]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    loaded = {}

    def load(architecture):
        if architecture not in loaded:
            name, _, head = architecture.partition("-")
            overrides = {"head_dim": int(head), "hidden_size": 64} if head else {}
            loaded[architecture] = load_policy(str(save_tiny(tmp_path_factory.mktemp(name), name, **overrides)))
        return loaded[architecture]

    return load


@contextmanager
def many_stops(policy):
    """Completions end after about 14 tokens."""
    usual = policy.model.generation_config.eos_token_id
    policy.model.generation_config.eos_token_id = list(range(2, 20))
    yield
    policy.model.generation_config.eos_token_id = usual


def some_requests(prompts=4, each=3):
    rng = np.random.default_rng(3)
    ids = [tuple(rng.integers(20, 259, length).tolist()) for length in (5, 40, 23, 11)]
    return [Request(f"p{number}", ids[number], seed=100 * number + k) for number in range(prompts) for k in range(each)]


class Turns:
    """Observations of random length behind every turn, until so many turns are over; keeps what was asked for."""

    def __init__(self, requests, turns):
        self.turns = turns
        self.asked = {index: [request] for index, request in enumerate(requests)}
        self.said = {index: [] for index in range(len(requests))}
        self.pool = ThreadPoolExecutor(4)

    def __call__(self, index, completion):
        return self.pool.submit(self.answer, index, completion)

    def answer(self, index, completion):
        asked, said = self.asked[index], self.said[index]
        said.append(completion)
        if len(said) == self.turns + index % 2:
            return None
        rng = np.random.default_rng([index, len(said)])
        observation = rng.integers(20, 259, rng.integers(1, 30)).tolist()
        ids = (*asked[-1].prompt_ids, *completion.token_ids, *observation)
        asked.append(replace(asked[-1], prompt_ids=ids, seed=1000 * len(said) + index, max_new_tokens=9))
        return asked[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_kept_gives_the_same_as_computing_anew(policies, architecture):
    policy = policies(architecture)
    sampler = LocalSampler(policy, "float32")
    requests = some_requests(*((2, 2) if architecture == "mamba" else ()))
    config = SamplingConfig(max_new_tokens=24, max_batch=5)
    turns = Turns(requests, 2 if architecture == "mamba" else 3)
    finished = {}
    with many_stops(policy):
        last = sampler.sample(requests, config, on_finish=finished.__setitem__, follow=turns)
        flat = [pair for index in turns.asked for pair in zip(turns.asked[index], turns.said[index], strict=True)]
        anew = sampler.sample([request for request, _ in flat], config)
    assert [len(said) for said in turns.said.values()] == [turns.turns + index % 2 for index in range(len(requests))]
    assert last == [turns.said[index][-1] for index in range(len(requests))]
    assert finished == dict(enumerate(last))
    assert {"stop", "length"} == {said.stop_reason for _, said in flat}
    for (_, said), other in zip(flat, anew, strict=True):
        assert said.token_ids == other.token_ids
        np.testing.assert_allclose(said.logprobs, other.logprobs, atol=2e-5)


def test_only_what_is_new_is_computed(policies):
    """Prompts together, once; of a later turn the last token before it and the observation; every other token alone."""
    policy, requests = policies("llama"), some_requests(2, 3)
    turns = Turns(requests, 3)
    shapes = []
    embeddings = policy.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    LocalSampler(policy, "float32").sample(requests, SamplingConfig(max_new_tokens=9, max_batch=8), follow=turns)
    hook.remove()
    said = [each for of_one in turns.said.values() for each in of_one]
    assert shapes[0] == (1, 64)  # 5 and 40 tokens, rounded up to a multiple of 32
    assert sum(rows for rows, tokens in shapes if tokens == 1) == sum(len(each.token_ids) - 1 for each in said)
    later = [tokens for _, tokens in shapes[1:] if tokens > 1]
    observed = [
        len(after.prompt_ids) - len(before.prompt_ids) - len(completion.token_ids)
        for asked, completions in zip(turns.asked.values(), turns.said.values(), strict=True)
        for before, after, completion in zip(asked, asked[1:], completions, strict=False)
    ]
    new = sum(observed) + len(observed)
    assert new <= sum(later) < new + 32 * len(later)


def test_bits_do_not_depend_on_how_long_an_answer_takes(policies):
    """The last answers come first: an answer that is late is waited for, one that is early has to wait."""
    policy = policies("llama")
    sampler, requests = LocalSampler(policy, "bfloat16"), some_requests(2, 3)
    config = SamplingConfig(max_new_tokens=12, max_batch=4)
    prompt, slow = Turns(requests, 3), Turns(requests, 3)
    held = []

    def at_once(index, completion):
        future = Future()
        future.set_result(prompt.answer(index, completion))
        return future

    class Late(Future):
        """Is made only when it is waited for."""

        def result(self, timeout=None):  # noqa: ARG002
            held.append(self)
            return slow.answer(*self.of)

    def late(index, completion):
        future = Late()
        future.of = index, completion
        return future

    sampler.sample(requests, config, follow=at_once)
    sampler.sample(requests, config, follow=late)
    assert len(held) == sum(map(len, slow.said.values()))
    assert prompt.said == slow.said
    assert local._ANSWER_STEPS < 9


def test_a_successor_that_rewrites_what_was_said_is_refused(policies):
    request = Request("p", (20, 21, 22), seed=0)

    def follow(_index, _completion):
        future = Future()
        future.set_result(Request("p", (20, 21, 22, 23, 24), seed=1))
        return future

    with pytest.raises(ValueError, match="begins with"):
        LocalSampler(policies("llama"), "float32").sample([request], SamplingConfig(max_new_tokens=3), follow=follow)
