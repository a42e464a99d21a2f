"""Tiny random models of many architectures, with a byte-level tokenizer: for tests, examples and plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from accord.registry import Registry

__all__ = ["TINY", "save_tiny", "tiny_model", "tiny_tokenizer"]

_SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_VOCABULARY = 256 + len(_SPECIAL)

_COMMON = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": _VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TINY: Registry[dict[str, Any]] = Registry("tiny architecture", "accord.tiny")
TINY.add("llama", {"model_type": "llama", **_COMMON, "tie_word_embeddings": True})
TINY.add("qwen2", {"model_type": "qwen2", **_COMMON})
TINY.add("qwen3", {"model_type": "qwen3", **_COMMON, "head_dim": 8})
TINY.add("gpt2", {"model_type": "gpt2", **_GPT2})
TINY.add("gemma", {"model_type": "gemma", **_COMMON, "head_dim": 8})
TINY.add("gemma2", {"model_type": "gemma2", **_COMMON, "head_dim": 8, "sliding_window": 16})
TINY.add("phi", {"model_type": "phi", **_COMMON, "num_key_value_heads": 4})
TINY.add("phi3", {"model_type": "phi3", **_COMMON})
TINY.add("mistral", {"model_type": "mistral", **_COMMON, "sliding_window": 16})
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
TINY.add(
    "deepseek_v3",
    {"model_type": "deepseek_v3", **_COMMON, "num_key_value_heads": 4, "head_dim": 4, **_LATENT, **_EXPERTS},
)
TINY.add("bloom", {"model_type": "bloom", "vocab_size": _VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4})
TINY.add("mamba", {"model_type": "mamba", "vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2})


def tiny_tokenizer(*, chat_template: str | None = _CHAT_TEMPLATE) -> Any:
    """A tokenizer with one token per byte and ChatML special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A causal language model with random float32 weights (large enough that its logits differ visibly)."""
    settings = {"initializer_range": 0.2, **TINY[architecture], **overrides}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def save_tiny(directory: Path, architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny model and its tokenizer in Hugging Face format; returns the directory."""
    tiny_model(architecture, seed=seed, **overrides).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
