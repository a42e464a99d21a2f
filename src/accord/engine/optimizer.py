"""AdamW, learning-rate schedules, gradient clipping."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from accord.config import Config

__all__ = ["OptimizerConfig", "build_optimizer", "learning_rate_at"]


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) with warm-up and decay."""

    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    gradient_clip: float = Field(1.0, gt=0)
    """Largest global norm of the gradient."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls after warm-up: to zero at the last step, or not at all."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps in which the learning rate rises from zero."""


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the given parameters, its moments in place.

    They live as long as the run: allocated before the first activation they leave no holes among those.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for parameter in parameters:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": step, **moments}
    return optimizer


def learning_rate_at(step: int, total: int, config: OptimizerConfig) -> float:
    """Learning rate of optimiser step `step` (0 … total-1)."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.learning_rate * factor
