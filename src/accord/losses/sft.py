"""SFT: supervised fine-tuning, the negative log-likelihood of the demonstrated tokens; and DFT, its dynamic variant.

N = tokens that carry loss in the whole optimiser step; the engine divides by their global count.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from accord.config import Config
from accord.losses.records import LOSSES, Loss, LossOutput, TokenLogprobs

__all__ = ["DFTConfig", "SFTConfig", "dft", "sft"]


class SFTConfig(Config):
    """Settings of the SFT loss."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """How much of the target's probability is spread evenly over the vocabulary (Szegedy et al. 2016)."""


def sft(inputs: TokenLogprobs, config: SFTConfig) -> LossOutput:
    """−(1−ε)·ℓ − ε·(mean of log p over the vocabulary), per token."""
    nll_N = -inputs.logprobs_N
    if config.label_smoothing == 0:
        return LossOutput(nll_N)
    if inputs.mean_logprob_N is None:
        raise ValueError("Label smoothing needs the statistic mean_logprob: bind the loss with Loss.bind.")
    loss_N = (1 - config.label_smoothing) * nll_N - config.label_smoothing * inputs.mean_logprob_N
    return LossOutput(loss_N, {"nll": nll_N})


class DFTConfig(Config):
    """DFT has no settings of its own."""


def dft(inputs: TokenLogprobs, config: DFTConfig) -> LossOutput:  # noqa: ARG001
    """−sg(p)·ℓ per token, sg = no gradient (Wu et al. 2025, "On the generalization of SFT").

    As a policy gradient, SFT's reward is 1/p of the demonstrated token; weighting by p makes it 1. Unlikely tokens
    teach less, so it fits noise less, and also new knowledge.
    """
    return LossOutput(-inputs.logprobs_N.detach().exp() * inputs.logprobs_N, {"nll": -inputs.logprobs_N})


_sft = Loss(sft, SFTConfig, TokenLogprobs)
_smoothed = replace(_sft, statistics=frozenset({"mean_logprob"}))
LOSSES.add("sft", replace(_sft, specialise=lambda config: _smoothed if config.label_smoothing else _sft))
LOSSES.add("dft", Loss(dft, DFTConfig, TokenLogprobs))
