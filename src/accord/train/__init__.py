"""Training: one loop, three recipes (`recipes/*.toml`), a run directory that resumes."""

from accord.train.config import TrainConfig, bind_loss, recipe, resolve, view_of
from accord.train.ensemble import train_ensemble
from accord.train.loop import train
from accord.train.run import Run, provenance

__all__ = ["Run", "TrainConfig", "bind_loss", "provenance", "recipe", "resolve", "train", "train_ensemble", "view_of"]
