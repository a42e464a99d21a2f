"""Settings of a training run, and the recipes: a recipe names a loss and its vetted defaults (TOML, package data)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from accord.config import Config, merge, parse_assignments, read_template, read_toml
from accord.engine.engine import EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.engine.views import VIEWS, View
from accord.errors import ConfigError, UnknownNameError, unknown_name
from accord.losses import LOSSES, BoundLoss
from accord.models.lora import LoRAConfig
from accord.models.network import RewardModel, RewardModelConfig
from accord.tracking import require_trackers
from accord.train.validation import ValidationConfig

__all__ = ["TrainConfig", "bind_loss", "recipe", "resolve", "view_of"]


class TrainConfig(Config):
    """Everything that decides what a run computes."""

    loss: dict[str, Any]
    """`name` and the settings of that loss."""
    data: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(None, min_length=1)
    """Several data sets and the weight of each: rows are drawn in these shares, by the seed, as `accord data mix` draws
    them (default: the one given with --data)."""
    epochs: int = Field(1, gt=0)
    batch_size: int = Field(8, gt=0)
    """Prompts per optimiser step."""
    max_steps: int | None = Field(None, gt=0)
    """Stop after this many optimiser steps; the schedule ends there."""
    max_tokens: int | None = Field(None, gt=1)
    """Longest prompt with completion (default: the model's context). A longer completion loses its end and is counted;
    a longer prompt is an error."""
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(100, gt=0)
    """Optimiser steps between checkpoints; a killed run repeats at most this many."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the model's own chat template."""
    neftune_alpha: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Noise on the input embeddings while training on demonstrations (NEFTune, Jain et al. 2024), which tries 5, 10 and
    15; 0: none."""
    samples: int = Field(4, ge=0)
    """Training prompts of which samples.html shows what the model says before and after training; 0: no such page."""
    trackers: tuple[str, ...] = ()
    """Who else is told of the metrics: `tensorboard`, `wandb`, `mlflow`, `trackio` (docs/tracking.md)."""
    lora: LoRAConfig | None = None
    reward_model: RewardModelConfig = RewardModelConfig()
    validation: ValidationConfig = ValidationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()

    def template(self) -> str | None:
        """The text of `chat_template`."""
        return read_template(self.chat_template)


def recipe(name: str) -> dict[str, Any]:
    """The values of a built-in recipe.

    Raises:
        UnknownNameError: there is none of this name; the message lists them all.
    """
    files = {
        file.name.removesuffix(".toml"): file for file in resources.files("accord.train").joinpath("recipes").iterdir()
    }
    if name not in files:
        raise UnknownNameError(unknown_name("recipe", name, sorted(files)))
    return tomllib.loads(files[name].read_text(encoding="utf-8"))


def resolve(
    name: str,
    file: Path | None = None,
    assignments: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Recipe, then `base`, the file, --set, and `extra`; the result is checked as a whole, its loss included."""
    own = recipe(name)
    if "rollout" in own:
        what = f"The recipe {name!r} learns from completions that the policy samples, not from data."
        fix = "`accord train` runs it (docs/online.md); here name one that learns from data."
        raise ConfigError(what, where=name, fix=fix)
    layers = [own, base or {}, read_toml(file) if file else {}, parse_assignments(assignments), extra or {}]
    config = TrainConfig.build(merge(*layers), where=str(file) if file else "--set")
    if VIEWS[bind_loss(config).loss.inputs].kind == "prompts":
        what = f"The loss {config.loss['name']!r} learns from completions that the policy samples, not from a file."
        raise ConfigError(what, where="loss.name", fix="Name a loss of demonstrations, preferences, labels or ratings.")
    require_trackers(config.trackers)
    return config


def bind_loss(config: TrainConfig) -> BoundLoss:
    """The loss that the settings name, with its own settings checked.

    Raises:
        ConfigError: a wrong setting, or one that would change nothing.
    """
    settings = dict(config.loss)
    loss = LOSSES[str(settings.pop("name", ""))]
    if config.reward_model != RewardModelConfig() and VIEWS[loss.inputs].network is not RewardModel:
        what = f"The loss {config.loss['name']!r} trains no reward model, so these settings would be ignored."
        raise ConfigError(what, where="[reward_model]", fix="Remove them, or use the recipe `reward`.")
    if config.reward_model.penalty and config.reward_model.members == 1:
        fix = "Set reward_model.members, or leave the penalty out."
        raise ConfigError("One model does not disagree with itself.", where="reward_model.penalty", fix=fix)
    if config.reward_model.attributes and VIEWS[loss.inputs].kind != "ratings":
        what = f"The loss {config.loss['name']!r} learns from no ratings, so these would be ignored."
        fix = "Remove them, or use the recipe `reward_ratings`."
        raise ConfigError(what, where="reward_model.attributes", fix=fix)
    if config.neftune_alpha and VIEWS[loss.inputs].kind != "demonstrations":
        what = f"Noise is for learning from demonstrations, and the loss {config.loss['name']!r} learns from others."
        fix = "Leave it out, or use the recipe `sft` or `dft`."
        raise ConfigError(what, where="neftune_alpha", fix=fix)
    if config.validation != ValidationConfig() and not config.validation.share:
        fix = "Set validation.share, e.g. to 0.1, or leave these settings out."
        raise ConfigError("Nothing is held out, so these settings would be ignored.", where="[validation]", fix=fix)
    if config.lora and config.reward_model.frozen_layers:
        what = "With LoRA every layer is frozen."
        raise ConfigError(what, where="reward_model.frozen_layers", fix="Leave out one of the two.")
    return loss.bind(settings)


def view_of(config: TrainConfig) -> View:
    """What the loss that the settings name reads: which data, and which network."""
    return VIEWS[bind_loss(config).loss.inputs]
