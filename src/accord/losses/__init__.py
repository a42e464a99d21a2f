"""Losses: pure tensor maths, one function of one record each (`accord.losses.records`)."""

from accord.losses.absolute import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from accord.losses.aot import AOTConfig, aot, aot_unpaired
from accord.losses.bco import bco
from accord.losses.bradley_terry import BradleyTerryConfig, bradley_terry
from accord.losses.divergences import DivergenceConfig
from accord.losses.dpo import DPOConfig, RobustConfig, SigmoidNormConfig, dpo, robust, sigmoid_norm
from accord.losses.kto import apo_zero_unpaired, kto
from accord.losses.labels import LabelConfig
from accord.losses.margins import DiscoPOPConfig, EXOConfig, HingeConfig, IPOConfig, discopop, exo_pair, hinge, ipo
from accord.losses.mixture import MixtureConfig, mixture
from accord.losses.orpo import ORPOConfig, orpo
from accord.losses.policy import CISPOConfig, PolicyConfig, PPOClipConfig, RatioConfig, cispo, ppo_clip, reinforce
from accord.losses.ppo import PPOConfig, ValueConfig, ppo, value
from accord.losses.preference import PairConfig, PreferenceConfig
from accord.losses.records import (
    LOSSES,
    BoundLoss,
    ControlledLogprobs,
    LabelledLogprobs,
    Loss,
    LossOutput,
    PairLogprobs,
    PairScores,
    PreferenceLogprobs,
    RatingScores,
    ReferencedRolloutTokens,
    RolloutTokens,
    TokenLogprobs,
    ValueTokens,
)
from accord.losses.regression import RegressionConfig, regression
from accord.losses.sft import DFTConfig, SFTConfig, dft, sft
from accord.losses.simpo import CPOConfig, SimPOConfig, cpo, simpo

__all__ = [
    "LOSSES",
    "AOTConfig",
    "BoundLoss",
    "BradleyTerryConfig",
    "CISPOConfig",
    "CPOConfig",
    "ControlledLogprobs",
    "DFTConfig",
    "DPOConfig",
    "DiscoPOPConfig",
    "DivergenceConfig",
    "EXOConfig",
    "HingeConfig",
    "IPOConfig",
    "LabelConfig",
    "LabelledLogprobs",
    "Loss",
    "LossOutput",
    "MixtureConfig",
    "ORPOConfig",
    "PPOClipConfig",
    "PPOConfig",
    "PairConfig",
    "PairLogprobs",
    "PairScores",
    "PolicyConfig",
    "PreferenceConfig",
    "PreferenceLogprobs",
    "RatingScores",
    "RatioConfig",
    "ReferencedRolloutTokens",
    "RegressionConfig",
    "RobustConfig",
    "RolloutTokens",
    "SFTConfig",
    "SigmoidNormConfig",
    "SimPOConfig",
    "TokenLogprobs",
    "ValueConfig",
    "ValueTokens",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_pair",
    "bradley_terry",
    "cispo",
    "cpo",
    "dft",
    "discopop",
    "dpo",
    "exo_pair",
    "hinge",
    "ipo",
    "kto",
    "mixture",
    "nca_pair",
    "orpo",
    "ppo",
    "ppo_clip",
    "regression",
    "reinforce",
    "robust",
    "sft",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
    "value",
]
