"""TRL's side of `offline.py`: the same steps by TRL's trainers, timed. Started by `offline.py`.

A step is what lies between the trainer's own `on_step_begin` and `on_step_end`: forward, backward, clip, optimiser
step. Its collation of the batch is not counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import (  # type: ignore[attr-defined]
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from accord.models.starter import starter_directory
from offline_plan import BETA, LEARNING_RATE, PACK, Consumed, Plan, Worker, consumed, draw_score_head

TRAINERS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "sft": (SFTTrainer, SFTConfig),
}
COLUMNS = {
    "dpo": ("prompt", "chosen", "rejected"),
    "reward": ("prompt", "chosen", "rejected"),
    "sft": ("prompt", "completion"),
}


def main(path: str, setting: str) -> None:
    plan, worker = Plan.read(path), Worker()
    trainer_class, config_class = TRAINERS[plan.task]
    columns = zip(*plan.rows, strict=True)
    data = Dataset.from_dict(dict(zip(COLUMNS[plan.task], map(list, columns), strict=True)))
    with tempfile.TemporaryDirectory() as directory:
        options = {**_common(plan, directory), **(_best(plan) if setting == "best" else {})}
        trainer = _watched(trainer_class, plan, worker)(
            model=str(starter_directory()), args=config_class(**options), train_dataset=data
        )
        if plan.task == "reward":
            draw_score_head(trainer.model)
        trainer.watch_batches()
        trainer.train()
    worker.end()


def _common(plan: Plan, directory: str) -> dict[str, Any]:
    """What must be set for TRL to run on a CPU and to do the same work as Accord; everything else is TRL's default."""
    return {
        "output_dir": directory,
        "use_cpu": True,
        "bf16": plan.precision == "bfloat16",
        "max_steps": len(plan.steps),
        "per_device_train_batch_size": 4,
        "learning_rate": LEARNING_RATE[plan.task],
        "lr_scheduler_type": "constant",
        **({"beta": BETA} if plan.task == "dpo" else {}),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _best(plan: Plan) -> dict[str, Any]:
    """TRL at its best on a CPU."""
    return {
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        **({"precompute_ref_log_probs": True} if plan.task == "dpo" else {}),
        **({"packing": True, "max_length": PACK} if plan.task == "sft" else {}),
    }


def _watched(trainer_class: type[Any], plan: Plan, worker: Worker) -> type[Any]:
    """The trainer, unchanged but for reading the rows in the plan's order and telling what it does."""

    class Watched(trainer_class):  # type: ignore[misc]
        def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
            began = time.perf_counter()
            result = super()._precompute_ref_logps(dataset, *args)
            worker.reference(time.perf_counter() - began, len(dataset))
            return result

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ARG002
            return plan.order

        def watch_batches(self) -> None:
            collate = self.data_collator
            self.batches: list[Consumed] = []

            def watched(examples: list[Any]) -> Any:
                batch = collate(examples)
                self.batches.append(_consumed(batch))
                return batch

            self.data_collator = watched
            self.add_callback(_Clock(self, worker))

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.last_loss = loss.item()
            return loss

    return Watched


class _Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: Any, worker: Worker) -> None:
        self.trainer, self.worker, self.done = trainer, worker, 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        seconds = time.perf_counter() - self.began
        # Batches are fetched ahead, in order.
        self.worker.step(seconds, self.trainer.last_loss, self.trainer.batches[self.done])
        self.done += 1


def _consumed(batch: dict[str, Any]) -> Consumed:
    """The sequences in a collated batch, without padding; a reward model has no token that carries loss."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        places = batch["position_ids"].flatten()
        starts = [*(places == 0).nonzero().flatten().tolist(), len(places)]
        mask = batch["labels"].flatten() != -100
        spans = [slice(start, stop) for start, stop in pairwise(starts)]
        return consumed((ids.flatten()[span].tolist(), mask[span].tolist()) for span in spans)
    real = batch["attention_mask"].bool()
    mask = batch["completion_mask"].bool() if "completion_mask" in batch else real & False
    return consumed((row[keep].tolist(), loss[keep].tolist()) for row, keep, loss in zip(ids, real, mask, strict=True))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
