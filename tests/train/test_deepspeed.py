"""A DeepSpeed file is read into settings; every key is followed, named as having no effect, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accord.errors import ConfigError
from accord.train import resolve
from accord.train.deepspeed import read_deepspeed


def read(path: Path, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    (path / "ds.json").write_text(json.dumps(values))
    return read_deepspeed(path / "ds.json")


def test_what_is_followed_becomes_settings(tmp_path: Path) -> None:
    values = {
        "train_batch_size": 64,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}},
    }
    settings, idle = read(tmp_path, values)
    assert idle == []
    config = resolve("sft", base=settings)
    assert config.batch_size == 64
    assert config.engine.precision == "bfloat16"
    assert config.engine.sharding is not None
    assert (config.engine.sharding.strategy, config.engine.sharding.cpu_offload) == ("grad", True)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (2e-5, 0.9, 0.95)
    assert (optimizer.epsilon, optimizer.weight_decay, optimizer.gradient_clip) == (1e-7, 0.1, 0.5)
    assert resolve("sft", assignments=["batch_size=8"], base=settings).batch_size == 8, "--set goes above the file"


def test_what_has_no_effect_is_named(tmp_path: Path) -> None:
    zero = {"stage": 3, "overlap_comm": True, "stage3_prefetch_bucket_size": "auto"}
    values = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": "auto"}
    settings, idle = read(tmp_path, values | {"zero_optimization": zero, "steps_per_print": 10})
    assert settings == {"batch_size": 32, "engine": {"sharding": {"strategy": "full"}}}
    assert set(idle) == {
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
        "zero_optimization.overlap_comm",
        "zero_optimization.stage3_prefetch_bucket_size",
        "steps_per_print",
    }


def test_all_that_cannot_be_followed_is_named_in_one_error(tmp_path: Path) -> None:
    """A pipeline, a stage without sharded gradients, fp16, another optimiser, an NVMe disk, a batch size unsaid."""
    values = {
        "zero_optimization": {"stage": 1, "offload_param": {"device": "nvme", "nvme_path": "/fast"}},
        "fp16": {"enabled": True},
        "optimizer": {"type": "Lamb"},
        "pipeline": {"stages": 2},
        "train_micro_batch_size_per_gpu": 4,
        "optimizer.params.betas": [0.9],
    }
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, values)
    message = str(caught.value)
    for key in (
        "zero_optimization.stage = 1",
        'zero_optimization.offload_param.device = "nvme"',
        "zero_optimization.offload_param.nvme_path",
        "fp16.enabled = true",
        'optimizer.type = "Lamb"',
        "pipeline.stages = 2",
        "train_micro_batch_size_per_gpu = 4",
        "optimizer.params.betas",
    ):
        assert key in message
    assert str(tmp_path / "ds.json") in message


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\xff"])
def test_a_file_of_another_kind_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        read_deepspeed(tmp_path / "ds.json")
    with pytest.raises(ConfigError, match="Cannot read this"):
        read_deepspeed(tmp_path / "none.json")
