"""SFT: supervised fine-tuning, the negative log-likelihood of the demonstrated tokens.

N = tokens that carry loss in the whole optimiser step; the engine divides by their global count.
"""

from __future__ import annotations

from accord.config import Config
from accord.losses.records import LOSSES, Loss, LossOutput, TokenLogprobs

__all__ = ["SFTConfig", "sft"]


class SFTConfig(Config):
    """SFT has no settings of its own."""


def sft(inputs: TokenLogprobs, config: SFTConfig) -> LossOutput:  # noqa: ARG001
    """−ℓ per token."""
    return LossOutput(-inputs.logprobs_N)


LOSSES.add("sft", Loss(sft, SFTConfig, TokenLogprobs))
