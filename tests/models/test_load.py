"""Loading: score heads new and trained, adapters, dropout, and names that cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from accord.errors import ModelError
from accord.models.load import load_policy, load_reward_model, load_tokenizer
from accord.models.lora import LoRAConfig, add_lora
from accord.models.tiny import save_tiny, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama"))


def test_a_language_model_gets_a_score_head_of_zeros(llama: str) -> None:
    assert not load_reward_model(llama, device=CPU).model.score.weight.any()


def test_a_trained_score_head_stays(llama: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    torch.nn.init.constant_(model.score.weight, 0.5)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert (load_reward_model(str(tmp_path), device=CPU).model.score.weight == 0.5).all()


def test_a_reward_model_is_no_policy(llama: str, tmp_path: Path) -> None:
    load_reward_model(llama, device=CPU).save(tmp_path / "reward")
    with pytest.raises(ModelError, match="This is a reward model"):
        load_policy(str(tmp_path / "reward"))


def test_a_score_head_in_an_adapter_stays(llama: str, tmp_path: Path) -> None:
    network = load_reward_model(llama, device=CPU)
    add_lora(network, LoRAConfig(rank=2))
    with torch.no_grad():
        for name, parameter in network.model.named_parameters():
            if "score" in name and parameter.requires_grad:
                parameter.fill_(0.25)
    network.save(tmp_path / "adapter")
    assert (load_reward_model(str(tmp_path / "adapter"), device=CPU).model.score.weight == 0.25).all()


def test_adapters_start_the_same_whatever_was_drawn_before(llama: str) -> None:
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        network = load_policy(llama, device=CPU)
        add_lora(network, LoRAConfig(rank=2), seed)
        return {name: p.detach() for name, p in network.model.named_parameters() if "lora_A" in name}

    first = adapters(3)
    torch.rand(17)
    again, other = adapters(3), adapters(4)
    assert len(first) == 3 * 7, "three layers of seven linear layers"
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_no_dropout_is_left(tmp_path: Path) -> None:
    """Log-probabilities in training mode are those of evaluation."""
    network = load_policy(str(save_tiny(tmp_path, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)), device=CPU)
    network.model.train()
    assert all(module.p == 0 for module in network.model.modules() if isinstance(module, torch.nn.Dropout))


def test_a_tokenizer_never_pads_with_a_stop_token_if_it_can(tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.unk_token = tokenizer.eos_token, "<pad>"
    tokenizer.save_pretrained(save_tiny(tmp_path))
    assert load_tokenizer(str(tmp_path)).pad_token == "<pad>"


@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_what_cannot_be_loaded_is_one_message(load: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE|Give a hub id"):
        load("nobody/nothing-of-this-name")
    (tmp_path / "weightless").mkdir()
    tiny_model("llama").config.save_pretrained(tmp_path / "weightless")
    tiny_tokenizer().save_pretrained(tmp_path / "weightless")
    with pytest.raises(ModelError, match="Cannot load this model"):
        load(str(tmp_path / "weightless"))
