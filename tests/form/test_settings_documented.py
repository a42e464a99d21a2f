"""Every setting has its row in docs/settings.md, under the key that the user types."""

from __future__ import annotations

from pathlib import Path

import pytest

from accord.advantages import ADVANTAGES
from accord.engine.engine import EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.engine.sharding import ShardingConfig
from accord.loop.round import RoundConfig
from accord.losses import LOSSES
from accord.models.lora import LoRAConfig
from accord.models.network import RewardModelConfig
from accord.sampling.connection import HTTPConfig
from accord.sampling.request import SamplingConfig
from accord.train import OnlineConfig, TrainConfig
from accord.train.online_config import CriticConfig, RolloutConfig, WorkersConfig
from accord.train.validation import ValidationConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
CLASSES = [
    ("", TrainConfig), ("optimizer.", OptimizerConfig), ("engine.", EngineConfig), ("engine.sharding.", ShardingConfig),
    ("lora.", LoRAConfig), ("reward_model.", RewardModelConfig), ("validation.", ValidationConfig),
    ("", OnlineConfig), ("rollout.", RolloutConfig), ("critic.", CriticConfig), ("workers.", WorkersConfig),
    ("sampler.", HTTPConfig), ("", SamplingConfig), ("", RoundConfig),
    *(("loss.", LOSSES[name].config) for name in LOSSES),
    *(("advantage.", ADVANTAGES[name].config) for name in ADVANTAGES),
]  # fmt: skip


@pytest.mark.parametrize(("prefix", "settings"), CLASSES, ids=lambda value: getattr(value, "__name__", None))
def test_every_setting_is_documented(prefix, settings):
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in settings.model_fields if f"| `{prefix}{name}` |" not in page] == []
