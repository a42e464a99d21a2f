"""TRL's side of `offline.py`: the same steps by TRL's trainers, timed. Started by `offline.py`.

A step is what lies between the trainer's own `on_step_begin` and `on_step_end`: forward, backward, clip, optimiser
step. Its collation of the batch is not counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import (  # type: ignore[attr-defined]
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from accord.models.starter import starter_directory
from offline_plan import BETA, LEARNING_RATE, PACK, Consumed, Plan, Worker, consumed, draw_score_head

TRAINERS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "dpo_chat": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "sft": (SFTTrainer, SFTConfig),
    "kto": (KTOTrainer, KTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
}
_PAIR = ("prompt", "chosen", "rejected")
COLUMNS = dict.fromkeys(TRAINERS, _PAIR) | {"sft": ("prompt", "completion"), "kto": ("prompt", "completion", "label")}
_REFERENCE = ("dpo", "dpo_chat", "kto")


def main(path: str, setting: str) -> None:
    plan, worker = Plan.read(path), Worker()
    trainer_class, config_class = TRAINERS[plan.task]
    columns = dict(zip(COLUMNS[plan.task], map(list, zip(*plan.rows, strict=True)), strict=True))
    if "label" in columns:
        columns["label"] = [label == "good" for label in columns["label"]]
    data = Dataset.from_dict(columns)
    with tempfile.TemporaryDirectory() as directory:
        options = {**_common(plan, directory), **(_best(plan) if setting == "best" else {})}
        model = str(starter_directory())
        own = {"processing_class": AutoTokenizer.from_pretrained(model)} if plan.task == "orpo" else {}
        trainer = _watched(trainer_class, plan, worker)(
            model=model, args=config_class(**options), train_dataset=data, **own
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
        "per_device_train_batch_size": 4 if plan.task == "sft" else len(plan.steps[0]),
        "learning_rate": LEARNING_RATE[plan.task],
        "lr_scheduler_type": "constant",
        **({"beta": BETA} if plan.task in (*_REFERENCE, "orpo") else {}),
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
        **({"precompute_ref_log_probs": True} if plan.task in _REFERENCE else {}),
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
            self.add_callback(Clock(self, worker))

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.last_loss = loss.item()
            return loss

    return Watched


class Clock(TrainerCallback):  # type: ignore[misc]
    """Tells the worker of every step: seconds, and the trainer's `last_loss` and `batches`."""

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
    if "chosen_input_ids" in batch:
        sides = [
            {name: batch[f"{side}_{name}"] for name in ("input_ids", "attention_mask", "labels")} for side in _PAIR[1:]
        ]
        return consumed(sequence for side in sides for sequence in _rows(side, side["labels"] != -100))
    ids = batch["input_ids"]
    if "position_ids" in batch:
        places = batch["position_ids"].flatten()
        starts = [*(places == 0).nonzero().flatten().tolist(), len(places)]
        mask = batch["labels"].flatten() != -100
        spans = [slice(start, stop) for start, stop in pairwise(starts)]
        return consumed((ids.flatten()[span].tolist(), mask[span].tolist()) for span in spans)
    nothing = batch["attention_mask"].bool() & False
    return consumed(_rows(batch, batch["completion_mask"].bool() if "completion_mask" in batch else nothing))


def _rows(batch: dict[str, Any], mask: Any) -> list[tuple[list[int], list[bool]]]:
    """Each row without its padding, and which of its tokens carry loss."""
    real = batch["attention_mask"].bool()
    rows = zip(batch["input_ids"], real, mask, strict=True)
    return [(row[keep].tolist(), loss[keep].tolist()) for row, keep, loss in rows]


def first(file: str, done: str) -> None:
    """SFT of a file of demonstrations by TRL at its best; the file `done` appears after the first step."""

    class Done(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            Path(done).touch()

    plan = Plan("sft", "bfloat16", [], [[0]], [0], 0)
    with tempfile.TemporaryDirectory() as directory:
        settings = SFTConfig(**_common(plan, directory), **_best(plan))
        data = load_dataset("json", data_files=file, split="train")
        SFTTrainer(str(starter_directory()), settings, train_dataset=data, callbacks=[Done()]).train()


if __name__ == "__main__":
    first(*sys.argv[2:]) if sys.argv[1] == "first" else main(*sys.argv[1:])
