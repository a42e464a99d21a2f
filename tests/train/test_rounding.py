"""What sampling and training round differently clips nothing where the ratio is one of whole completions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accord.cli import run
from accord.train import resolve_online
from accord.train.online_config import importance_cap_of, learns_afresh

REWARD = "def score(prompts, completions):\n    return [sum(c.token_ids) % 97 for c in completions]\n"


@pytest.mark.parametrize(
    ("name", "settings", "clipped"),
    [
        ("gspo", [], 0.0),
        ("gspo", ["rollout.mini_batches=1"], 0.0),
        ("gspo", ["rollout.importance_cap=0"], None),
        ("rloo", [], 0.0),
    ],
)
def test_rounding_alone_clips_no_completion(
    name: str, settings: list[str], clipped: float | None, tiny_llama: Path, tmp_path: Path
) -> None:
    """In bfloat16, with a learning rate at which nothing moves; the ratio to what sampled is outside of the clip."""
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Say {k}:"}}\n' for k in range(8)))
    common = ["steps=1", "batch_size=8", "sampling.max_new_tokens=32", "engine.precision=bfloat16", "samples=0"]
    common += ["optimizer.learning_rate=1e-12", *settings]
    words = [word for setting in common for word in ("--set", setting)]
    files = ["--data", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "run")]
    reward = ["--reward", f"{tmp_path / 'mine.py'}:score"]
    assert run(["train", name, "--model", str(tiny_llama), *files, *reward, *words]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if clipped is None:
        assert row["clip_ratio/region_mean"] > 0.1
    else:
        assert row["clip_ratio/region_mean"] == clipped
        assert row["val/ratio"] == pytest.approx(1, abs=1e-4)


def test_where_the_ratio_is_taken_to() -> None:
    """Several updates need a forward pass, and get importance weights by default; one update needs neither."""
    cases = [
        ("gspo", [], 2.0, False),
        ("gspo", ["rollout.mini_batches=1"], 0.0, True),
        ("gspo", ["rollout.importance_cap=0"], 0.0, False),
        ("gspo", ["rollout.importance_cap=5"], 5.0, False),
        ("rloo", [], 0.0, True),
        ("rloo", ["rollout.epochs=2"], 2.0, False),
        ("rloo", ["rollout.max_staleness=1"], 2.0, False),
        ("grpo", ["rollout.mini_batches=4"], 0.0, False),
        ("online_dpo", [], 0.0, False),
    ]
    for recipe, settings, cap, afresh in cases:
        config = resolve_online(recipe, None, settings)
        assert (importance_cap_of(config), learns_afresh(config)) == (cap, afresh), (recipe, settings)
