"""LoRA (Hu et al. 2022) through peft: the files that a run writes load in peft, and the base stays the reference.

QLoRA (Dettmers et al. 2023): the frozen weights of the linear layers are held in 4 bits by bitsandbytes, on CUDA.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from accord.config import Config
from accord.errors import ModelError, ResourceError
from accord.models.fuse import Linear
from accord.models.network import HEADS, Network, RewardModel

__all__ = ["LoRAConfig", "add_lora"]


class LoRAConfig(Config):
    """Low-rank adapters on every linear layer of the body."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    quantise: Literal["nf4"] | None = None
    """Hold the frozen linear layers in 4-bit NormalFloat (QLoRA): an eighth of their memory. Needs CUDA."""


def add_lora(network: Network, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze the network and put trainable adapters into its linear layers (a reward model's head is trained whole).

    Half of the adapters' weights start at random: they are drawn from `seed` alone, so a run that starts again, starts
    the same. The reference is the network with its adapters off: quantised, if the settings quantise it.

    Raises:
        ModelError: 4-bit weights are wanted, and the network is not on a CUDA device.
        ResourceError: they are wanted, and bitsandbytes is not installed.
    """
    import peft  # imported here because it takes a second

    if config.quantise:
        _quantise(network, config.quantise)
    head = HEADS[network.pooling] if isinstance(network, RewardModel) else None
    settings = peft.LoraConfig(
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=[head] if head else None,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        torch.manual_seed(seed)
        network.adapter = peft.get_peft_model(network.model, settings)


def _quantise(network: Network, kind: str) -> None:
    """Put the linear layers of the body into 4 bits, in place."""
    where = f'lora.quantise = "{kind}"'
    if network.device.type != "cuda":
        fix = "Leave it out, or train on a machine with a GPU."
        raise ModelError("4-bit weights need CUDA, and this model is on the CPU.", where=where, fix=fix)
    try:
        import bitsandbytes
    except ImportError:
        fix = "pip install 'accord[qlora]'"
        raise ResourceError("4-bit weights need bitsandbytes.", where=where, fix=fix) from None
    _to_four_bits(network.model, bitsandbytes)


def _to_four_bits(model: Any, bitsandbytes: Any) -> None:
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear:
                setattr(parent, name, _four_bits(child, bitsandbytes))
    model.is_loaded_in_4bit = True  # peft asks this before it puts adapters on such layers


def _four_bits(linear: nn.Linear, bitsandbytes: Any) -> nn.Module:
    device = linear.weight.device
    layer: nn.Module = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, quant_type="nf4", module=layer).to(device)
    layer.bias = linear.bias
    return layer.requires_grad_(False)
