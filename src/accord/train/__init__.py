"""Training: one loop, recipes (`recipes/*.toml`), a run directory that resumes."""

from accord.train.config import TrainConfig, bind_loss, recipe, resolve, view_of
from accord.train.ensemble import train_ensemble
from accord.train.offline import train
from accord.train.online import train_online
from accord.train.online_config import OnlineConfig, is_online, method_of, resolve_online
from accord.train.rollouts import encode_prompts
from accord.train.run import Run, provenance

__all__ = [
    "OnlineConfig",
    "Run",
    "TrainConfig",
    "bind_loss",
    "encode_prompts",
    "is_online",
    "method_of",
    "provenance",
    "recipe",
    "resolve",
    "resolve_online",
    "train",
    "train_ensemble",
    "train_online",
    "view_of",
]
