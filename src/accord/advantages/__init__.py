"""From the scores of completions to the advantage of every token. numpy only."""

from accord.advantages.distill import ReverseKLConfig, reverse_kl
from accord.advantages.gae import GAEConfig, gae
from accord.advantages.group import GroupRelativeConfig, RLOOConfig, group_relative, rloo
from accord.advantages.kl import KLConfig, adapted, kl_of
from accord.advantages.records import ADVANTAGES, Advantage, BoundAdvantage, Credit, Group, Memory, is_idle
from accord.advantages.reinforce import ReinforceConfig, ReinforcePlusPlusConfig, reinforce, reinforce_plus_plus
from accord.advantages.weights import Average, overlong_penalty, token_weights

__all__ = [
    "ADVANTAGES",
    "Advantage",
    "Average",
    "BoundAdvantage",
    "Credit",
    "GAEConfig",
    "Group",
    "GroupRelativeConfig",
    "KLConfig",
    "Memory",
    "RLOOConfig",
    "ReinforceConfig",
    "ReinforcePlusPlusConfig",
    "ReverseKLConfig",
    "adapted",
    "gae",
    "group_relative",
    "is_idle",
    "kl_of",
    "overlong_penalty",
    "reinforce",
    "reinforce_plus_plus",
    "reverse_kl",
    "rloo",
    "token_weights",
]
