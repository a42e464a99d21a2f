"""Losses: pure tensor maths, one function of one record each (`accord.losses.records`)."""

from accord.losses.bradley_terry import BradleyTerryConfig, bradley_terry
from accord.losses.dpo import DPOConfig, dpo
from accord.losses.records import LOSSES, Loss, LossOutput, PairScores, PreferenceLogprobs, TokenLogprobs
from accord.losses.sft import SFTConfig, sft

__all__ = [
    "LOSSES",
    "BradleyTerryConfig",
    "DPOConfig",
    "Loss",
    "LossOutput",
    "PairScores",
    "PreferenceLogprobs",
    "SFTConfig",
    "TokenLogprobs",
    "bradley_terry",
    "dpo",
    "sft",
]
