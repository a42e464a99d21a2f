"""A DeepSpeed configuration (JSON) as settings. What cannot be followed is an error, what has no effect is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accord.config import flatten
from accord.errors import ConfigError

__all__ = ["read_deepspeed"]

_STRATEGIES = {2: "grad", 3: "full"}


def read_deepspeed(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings that a DeepSpeed file stands for, and the keys in it that have no effect here.

    Buffer sizes and overlap are FSDP's affair, micro-batches are packed by tokens, and "auto" leaves our default.

    Raises:
        ConfigError: the file cannot be read, or asks for something that is not supported; all such keys are named.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "Give the path of a DeepSpeed configuration in JSON."
        raise ConfigError(f"Cannot read this: {error}.", where=f"--deepspeed {path}", fix=fix) from None
    settings: dict[str, Any] = {}
    idle: list[str] = []
    wrong: list[str] = []
    flat = flatten(values if isinstance(values, Mapping) else {"": values})
    # What decides the batch may stand in these two alone: then it must be said, else they only say how it is cut.
    batch = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} if "train_batch_size" in flat else set()
    for key, value in flat.items():
        if value == "auto" or key in _IDLE | batch or key.startswith(_IDLE_SECTIONS):
            idle.append(key)
            continue
        try:
            for place, mine in _RULES[key](value).items():
                _put(settings, place, mine)
        except (KeyError, TypeError, ValueError, AttributeError):
            wrong.append(f"{key} = {json.dumps(value)}")
    if wrong:
        fix = "Remove these, or say them in settings of Accord; a batch is said by train_batch_size. See docs/scale.md."
        raise ConfigError(f"Not supported: {', '.join(wrong)}.", where=f"--deepspeed {path}", fix=fix)
    return settings, idle


def _put(settings: dict[str, Any], place: str, value: Any) -> None:
    *parents, leaf = place.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[leaf] = value or settings.get(leaf, value)  # offloading of one part of two is offloading


Rule = Callable[[Any], dict[str, Any]]
"""From a value to settings of ours by their place; none: the value says what is so anyway; an error: refused."""


def _as(place: str) -> Rule:
    return lambda value: {place: value}


def _only(*allowed: Any) -> Rule:
    def rule(value: Any) -> dict[str, Any]:
        if value not in allowed:
            raise ValueError(value)
        return {}

    return rule


def _offload(device: str) -> dict[str, Any]:
    return {"engine.sharding.cpu_offload": {"cpu": True, "none": False}[device]}


def _betas(values: Any) -> dict[str, Any]:
    first, second = values
    return {"optimizer.beta1": first, "optimizer.beta2": second}


_RULES: dict[str, Rule] = {
    "train_batch_size": _as("batch_size"),
    "gradient_clipping": _as("optimizer.gradient_clip"),
    "zero_optimization.stage": lambda stage: {"engine.sharding.strategy": _STRATEGIES[stage]},
    "zero_optimization.offload_optimizer.device": _offload,
    "zero_optimization.offload_param.device": _offload,
    "bf16.enabled": lambda on: {"engine.precision": "bfloat16"} if on else {},
    "fp16.enabled": _only(False),
    "optimizer.type": lambda name: _only("adam", "adamw")(name.lower()),
    "optimizer.params.lr": _as("optimizer.learning_rate"),
    "optimizer.params.weight_decay": _as("optimizer.weight_decay"),
    "optimizer.params.eps": _as("optimizer.epsilon"),
    "optimizer.params.betas": _betas,
    "optimizer.params.torch_adam": _only(True, False),
    "optimizer.params.adam_w_mode": _only(True),
}

_IDLE = {
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    *(
        f"zero_optimization.{name}"
        for name in (
            "allgather_bucket_size",
            "allgather_partitions",
            "contiguous_gradients",
            "offload_optimizer.pin_memory",
            "offload_param.pin_memory",
            "overlap_comm",
            "reduce_bucket_size",
            "reduce_scatter",
            "round_robin_gradients",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "sub_group_size",
        )
    ),
}
_IDLE_SECTIONS = ("comms_logger.", "flops_profiler.", "tensorboard.", "wandb.", "csv_monitor.")
