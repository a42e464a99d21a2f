"""TRL's side of `online.py`: the same steps by its trainers, timed. Started by `online.py`.

A step is what lies between the trainer's own `on_step_begin` and `on_step_end`: sampling, rewards, forward, backward,
clip, optimiser step.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # type: ignore[attr-defined]

from accord.models.starter import starter_directory
from offline_plan import Consumed, Worker
from offline_trl import Clock
from online_plan import COMPLETIONS, LEARNING_RATE, NEW_TOKENS, PROMPTS, OnlinePlan, closeness, sampled

TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, {"loss_type": "grpo"}),  # each completion averages its tokens
    "rloo": (RLOOTrainer, RLOOConfig, {}),
}
_MICRO_BATCH = 8
"""Completions that are trained on together. All 32 at once without activation checkpointing may not fit in 24 GiB."""


def main(path: str) -> None:
    plan, worker = OnlinePlan.read(path), Worker()
    trainer_class, config_class, own = TRAINERS[plan.task]
    with tempfile.TemporaryDirectory() as directory:
        trainer = _watched(trainer_class)(
            model=str(starter_directory()),
            reward_funcs=_reward,
            args=config_class(**_settings(plan, directory), **own),
            train_dataset=Dataset.from_dict({"prompt": plan.prompts}),
        )
        trainer.add_callback(Clock(trainer, worker))
        trainer.train()
    worker.end()


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [closeness(text) for text in completions]


def _settings(plan: OnlinePlan, directory: str) -> dict[str, Any]:
    """TRL at its best on a CPU, doing the same work as Accord; everything else is its default."""
    return {
        "output_dir": directory,
        "use_cpu": True,
        "bf16": True,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "max_steps": plan.steps,
        "per_device_train_batch_size": _MICRO_BATCH,
        "gradient_accumulation_steps": PROMPTS * COMPLETIONS // _MICRO_BATCH,
        "num_generations": COMPLETIONS,
        "max_completion_length": NEW_TOKENS,
        "shuffle_dataset": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _watched(trainer_class: type[Any]) -> type[Any]:
    """The trainer, unchanged but for telling what it does."""

    class Watched(trainer_class):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            rows = zip(output["prompt_ids"], output["prompt_mask"].bool(), strict=True)
            tokens = int(output["completion_mask"].sum())
            self.batches: list[Consumed] = getattr(self, "batches", [])
            self.batches.append(sampled([row[real].tolist() for row, real in rows], tokens))
            self.last_loss = 0.0
            return output

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.last_loss += loss.item()
            return loss

    return Watched


if __name__ == "__main__":
    main(sys.argv[1])
