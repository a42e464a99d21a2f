"""Compiled code against torch: attention by a naive loop, norm, gate, choice; the stack of layers; no compiler."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from accord.models import native as module
from accord.models.decoder_stack import decoder_stack
from accord.models.load import load_policy
from accord.models.lora import LoRAConfig, add_lora
from accord.models.tiny import save_tiny
from accord.sampling.choose import Shaping, choose

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
"""Of numbers about 1: bfloat16 has 8 bits."""


@pytest.fixture(scope="module")
def kernels():
    found = module.native()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotated(states, cos, sin):
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return states.float() * cos[:, None] + turned.float() * sin[:, None]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("H", "K", "D"), [(9, 3, 64), (5, 1, 16), (4, 4, 80)])
def test_attention_is_that_of_a_naive_loop(kernels, dtype, window, H, K, D):
    M, G, P, S, column = 6, 3, 64, 96, 70
    states = [random(M, heads, D, dtype=dtype, seed=seed) for seed, heads in enumerate((H, K, K))]
    shapes = [(G, K, D, P), (G, K, P, D), (M + 1, K, D, S), (M + 1, K, S, D)]
    cache = [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes, 5)]
    angles = random(M, D, dtype=torch.float32, seed=9)
    cos, sin = angles.cos(), angles.sin()
    prompt, length = torch.tensor([2, 0, 1, 1, 0, 2]), torch.tensor([64, 3, 37])
    start = torch.tensor([0, 70, 65, 33, 64, 12])
    position = length[prompt] + column - start
    before = [tensor.clone() for tensor in cache]

    seats = torch.argsort(prompt), prompt, length, start, position
    out = kernels.attend(tuple(states), (cos, sin), tuple(cache), seats, column, 0.2, window)

    query, key = (rotated(each, cos, sin).to(dtype).float() for each in states[:2])
    torch.testing.assert_close(cache[2][:M, :, :, column].float(), key, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(cache[3][:M, :, column], states[2])
    for index in (2, 3):  # nothing else is written
        cache[index][:M].select(5 - index, column).zero_()
        before[index][:M].select(5 - index, column).zero_()
        assert torch.equal(cache[index], before[index])
        assert torch.equal(cache[index - 2], before[index - 2])
    for m in range(M):
        for h in range(H):
            k, g, first = h // (H // K), prompt[m], start[m]
            keys = [cache[0][g, k, :, : length[g]].T, cache[2][m, k, :, first:column].T, key[m, k][None]]
            values = [cache[1][g, k, : length[g]], cache[3][m, k, first:column], states[2][m, k][None]]
            scores = torch.cat([each.float() for each in keys]) @ query[m, h] * 0.2
            seen = torch.cat([each.float() for each in values])
            if window is not None:
                scores, seen = scores[-window:], seen[-window:]
            expected = torch.softmax(scores, 0) @ seen
            torch.testing.assert_close(out[m, h].float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_and_gate(kernels, dtype):
    hidden, weight = random(5, 48, dtype=torch.float32, seed=0) * 100, random(48, dtype=torch.float32, seed=1)
    delta, out = random(5, 48, dtype=dtype, seed=2), torch.empty(5, 48, dtype=dtype)
    expected = hidden + delta
    kernels.norm(hidden, delta, weight, 1e-5, out)
    assert torch.equal(hidden, expected)
    normed = F.rms_norm(expected, (48,), weight, 1e-5)
    torch.testing.assert_close(out.float(), normed, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    gate, up = random(5, 48, dtype=dtype, seed=3) * 20, random(5, 48, dtype=dtype, seed=4)
    expected = F.silu(gate.float()) * up
    kernels.swiglu(gate, up)
    torch.testing.assert_close(gate.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("V", [1, 7, 256, 1000])
@pytest.mark.parametrize("temperature", [1e-6, 0.7, 1.0, 3.0])
@pytest.mark.usefixtures("kernels")
def test_the_same_choice_as_without(monkeypatch, dtype, V, temperature):
    M = 40
    logits = random(M, V, dtype=dtype, seed=V) * 5
    logits[:, 1::3] = float("-inf")
    uniform = torch.cat([torch.rand(M - 2, dtype=torch.float64), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    none = torch.zeros(M)
    shaping = Shaping(torch.full((M,), temperature), torch.ones(M), torch.zeros(M, dtype=torch.int64), none)
    found = choose(logits, uniform, shaping)
    monkeypatch.setattr("accord.sampling.choose.native", lambda: None)
    expected = choose(logits, uniform, shaping)
    same = found.tokens_M == expected.tokens_M
    assert same.sum() >= M - 1  # a number at the border of two tokens may fall to either
    assert (logits.gather(1, found.tokens_M[:, None]) > float("-inf")).all()
    for one, other in (
        (found.logprobs_M, expected.logprobs_M),
        (found.raw_logprobs_M, expected.raw_logprobs_M),
    ):
        torch.testing.assert_close(one[same], other[same], atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_which_models_have_the_shape_of_the_stack(tmp_path):
    def fits(architecture, **settings):
        name = "-".join([architecture, *settings])
        return decoder_stack(load_policy(str(save_tiny(tmp_path / name, architecture, **settings))).model) is not None

    assert fits("llama", head_dim=16)
    assert fits("qwen2", hidden_size=64)  # with biases
    assert fits("mistral", head_dim=32)
    assert not fits("llama")  # heads of 8 are no whole vectors
    assert not fits("qwen3", head_dim=16)  # norms of queries and keys
    assert not fits("gemma", head_dim=16)  # scaled embeddings, another gate
    assert not fits("llama", head_dim=16, hidden_act="gelu")


@pytest.mark.usefixtures("kernels")
def test_a_model_that_differs_in_a_number_only_is_found_out(tmp_path, monkeypatch):
    policy = load_policy(str(save_tiny(tmp_path, head_dim=16)))
    layer = type(policy.model.base_model.layers[0])
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, states, **rest: forward(self, states * 1.01, **rest))
    assert decoder_stack(policy.model) is None


@pytest.mark.usefixtures("kernels")
def test_adapters_are_called(tmp_path):
    policy = load_policy(str(save_tiny(tmp_path, head_dim=16)))
    add_lora(policy, LoRAConfig(rank=2))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert decoder_stack(policy.model) is not None


def test_without_a_compiler_it_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.native.__wrapped__() is None
    assert "c++ not found" in capsys.readouterr().err
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert module.native.__wrapped__() is None
    assert "fatal error: no such header" in capsys.readouterr().err
