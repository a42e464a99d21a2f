"""Losses: pure tensor maths, one function of one record each (`accord.losses.records`)."""

from accord.losses.bco import bco
from accord.losses.bradley_terry import BradleyTerryConfig, bradley_terry
from accord.losses.dpo import DPOConfig, dpo
from accord.losses.kto import apo_zero_unpaired, kto
from accord.losses.labels import LabelConfig
from accord.losses.records import (
    LOSSES,
    ControlledLogprobs,
    LabelledLogprobs,
    Loss,
    LossOutput,
    PairScores,
    PreferenceLogprobs,
    TokenLogprobs,
)
from accord.losses.sft import SFTConfig, sft

__all__ = [
    "LOSSES",
    "BradleyTerryConfig",
    "ControlledLogprobs",
    "DPOConfig",
    "LabelConfig",
    "LabelledLogprobs",
    "Loss",
    "LossOutput",
    "PairScores",
    "PreferenceLogprobs",
    "SFTConfig",
    "TokenLogprobs",
    "apo_zero_unpaired",
    "bco",
    "bradley_terry",
    "dpo",
    "kto",
    "sft",
]
