"""The layers of a Llama-shaped model, called one by one for a decoding step on a CPU: `native` between the products.

Linear layers are the model's own modules, so whatever stands in for them (LoRA, packed weights) is used. Whether a
model has this shape is tried on random tokens: the answers must be the model's own, so no model is known by name.

M = sequences, H = query heads, K = key/value heads, D = head size, C = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from accord.models.fuse import GatedMLP, RMSNorm
from accord.models.kv_cache import Decode, Kept, Prefill, SlotCache
from accord.models.native import Native, native
from accord.models.packing import MicroBatch, Part, pack_one
from accord.models.trees import Tree

__all__ = ["DecoderStack", "decoder_stack"]

_TRIED: WeakKeyDictionary[nn.Module, DecoderStack | None] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class DecoderStack:
    """Embedding, layers of (norm, attention, norm, gated MLP), norm.

    Attributes:
        scores: of every attention module the scale of its scores and its window, as the model itself hands them on.
    """

    body: Any
    kernels: Native
    scores: Mapping[nn.Module, tuple[float, int | None]]

    def step(self, tokens_M: Tensor, batch: Decode, positions_M: Tensor, dtype: torch.dtype) -> Tensor:
        """Hidden states [M, C] in `dtype`, the precision of the products."""
        body, kernels = self.body, self.kernels
        hidden_MC = body.embed_tokens(tokens_M).float()
        M, C = hidden_MC.shape
        cos, sin = body.rotary_emb(hidden_MC, positions_M[None])
        rotation = cos[0].float().contiguous(), sin[0].float().contiguous()
        normed_MC, delta_MC = hidden_MC.new_empty(M, C, dtype=dtype), None
        for layer in body.layers:
            attention, mlp = layer.self_attn, layer.mlp
            norm = layer.input_layernorm
            kernels.norm(hidden_MC, delta_MC, norm.weight, norm.epsilon, normed_MC)
            query = attention.q_proj(normed_MC).view(M, -1, attention.head_dim)
            key = attention.k_proj(normed_MC).view(M, -1, attention.head_dim)
            value = attention.v_proj(normed_MC).view(M, -1, attention.head_dim)
            scale, window = self.scores[attention]
            attended = batch.attend_natively(kernels, attention, (query, key, value), rotation, scale, window)
            norm = layer.post_attention_layernorm
            kernels.norm(hidden_MC, attention.o_proj(attended.view(M, -1)), norm.weight, norm.epsilon, normed_MC)
            gate = mlp.gate_proj(normed_MC)
            kernels.swiglu(gate, mlp.up_proj(normed_MC))
            delta_MC = mlp.down_proj(gate)
        kernels.norm(hidden_MC, delta_MC, body.norm.weight, body.norm.epsilon, normed_MC)
        return normed_MC


def decoder_stack(model: nn.Module) -> DecoderStack | None:
    """The stack of this model, or None where it has another shape, another device, or nothing to call."""
    body: Any = model.base_model
    if body not in _TRIED:
        _TRIED[body] = _try(body)
    return _TRIED[body]


class _Listening(Decode):
    """A step that notes what the model asks of its attention."""

    def __init__(self, step: Decode) -> None:
        vars(self).update(vars(step))
        self.heard: dict[nn.Module, tuple[float, int | None]] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if softcap is None:
            self.heard[module] = scale, window
        return super().attend(module, query, key, value, scale, window, softcap)


def _try(body: Any) -> DecoderStack | None:
    if not _fits(body) or (kernels := native()) is None:
        return None
    rows, tokens, positions = _probe(body)
    with torch.no_grad():
        caches = [SlotCache(2), SlotCache(2)]
        prefill = Prefill(rows)
        body(input_ids=rows.input_ids_T[None], position_ids=rows.positions_T[None], batch=prefill, use_cache=False)
        for cache in caches:
            for slot, tree in enumerate(rows.layout[:2]):
                cache.enter(Kept(prefill, tree.prompt), slice(slot, slot + 1))
        for _ in range(2):
            listening = _Listening(caches[0].extend(2, positions))
            own = body(input_ids=tokens[:, None], position_ids=positions[:, None], batch=listening, use_cache=False)
            stack = DecoderStack(body, kernels, listening.heard)
            if any(layer.self_attn not in stack.scores for layer in body.layers):
                return None
            said = stack.step(tokens, caches[1].extend(2, positions), positions, torch.float32)
            if not torch.allclose(own.last_hidden_state[:, 0], said, rtol=1e-3, atol=1e-4):
                return None
            positions = positions + 1
    return stack


def _fits(body: Any) -> bool:
    """Whether every module that the stack calls is there, in a kind and a size that it can call, and no other is."""
    children = {name for name, _ in body.named_children()}
    if children != {"embed_tokens", "layers", "norm", "rotary_emb"} or not _is_plain_norm(body.norm):
        return False
    return all(_fits_layer(layer) for layer in body.layers)


def _fits_layer(layer: Any) -> bool:
    expected = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if {name for name, _ in layer.named_children()} != expected or not isinstance(layer.mlp, GatedMLP):
        return False
    products = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if {name for name, _ in layer.self_attn.named_children()} != products:
        return False
    size, inner = getattr(layer.self_attn, "head_dim", 0), getattr(layer.mlp.gate_proj, "out_features", 0)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        Native.attends(torch.float32, size)
        and Native.takes(torch.float32, inner)
        and all(_is_plain_norm(norm) for norm in norms)
    )


def _is_plain_norm(norm: nn.Module) -> bool:
    """On the CPU, in float32, whole on this rank, without an offset."""
    if not isinstance(norm, RMSNorm) or norm.offset:
        return False
    weight = norm.weight
    whole = not hasattr(weight, "full_tensor") and weight.device.type == "cpu"
    return whole and Native.takes(weight.dtype, len(weight)) and weight.dtype == torch.float32


def _probe(body: Any) -> tuple[MicroBatch, Tensor, Tensor]:
    """Two random prompts, packed, and for each a token to go on with and its position."""
    generator = np.random.default_rng(0)
    size = min(body.config.get_text_config().vocab_size, 1000)
    prompts = [generator.integers(0, size, length) for length in (7, 4)]
    rows = pack_one([Part(0, ()), Part(1, ())], [Tree(prompt, (), ranks=()) for prompt in prompts])
    return rows, torch.from_numpy(generator.integers(0, size, 2)), torch.tensor([7, 4])
