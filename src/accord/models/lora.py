"""LoRA (Hu et al. 2022) through peft: the files that a run writes load in peft, and the base stays the reference."""

from __future__ import annotations

import warnings

import torch
from pydantic import Field

from accord.config import Config
from accord.models.network import HEADS, Network, RewardModel

__all__ = ["LoRAConfig", "add_lora"]


class LoRAConfig(Config):
    """Low-rank adapters on every linear layer of the body."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""


def add_lora(network: Network, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze the network and put trainable adapters into its linear layers (a reward model's head is trained whole).

    Half of the adapters' weights start at random: they are drawn from `seed` alone, so a run that starts again, starts
    the same.
    """
    import peft  # imported here because it takes a second

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
