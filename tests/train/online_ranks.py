"""One rank of a job that runs online recipes, started by test_online_ranks.py: `online_ranks.py DIRECTORY`.

Each run stands in DIRECTORY/<world>/<case>.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from accord.cli import run
from accord.engine.distributed import process_group, world_size

# name: (recipe, its settings)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    # Five prompts on two ranks; the reward fails for some completions, and some prompts have no advantage.
    "grpo": ("grpo", ("loss.kl_coefficient=0.1", "rollout.mini_batches=2", "rollout.epochs=2")),
    "ppo": ("ppo", ("rollout.mini_batches=2",)),
    "critic": ("ppo", ("loss.name=ppo_clip", "critic.model=REWARD", "engine.sharding.strategy=grad")),
    "dapo": ("dapo", ("rollout.dynamic_sampling=2", "rollout.completions=2")),
    "online_dpo": ("online_dpo", ("lora.rank=3",)),
}
# AdamW divides by the size of the gradient: where that is rounding, its sign would decide a whole step.
SETTINGS = (
    "steps=3", "batch_size=5", "checkpoint_every=2", "samples=2", "engine.precision=float32", "optimizer.epsilon=1e-5",
    "engine.micro_batch_tokens=64", "optimizer.learning_rate=0.003", "sampling.max_new_tokens=7",
)  # fmt: skip

REWARDS = """
def half(prompts, completions):
    "The share of even tokens, in fifths; nothing of a completion that begins with one of a few tokens."
    return [
        None if c.token_ids[0] % 7 == 0 else round(5 * sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids)) / 5
        for c in completions
    ]
"""


def command(directory: Path, world: int, name: str) -> list[str]:
    recipe, more = CASES[name]
    settings = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    settings = [word.replace("REWARD", str(directory / "reward")) for word in settings]
    data = ["--data", str(directory / "prompts.jsonl"), "--reward", f"{directory / 'rewards.py'}:half"]
    out = directory / str(world) / name
    if world == 1 and "engine.sharding.strategy=grad" in settings:
        where = settings.index("engine.sharding.strategy=grad")
        del settings[where - 1 : where + 1]
    return ["train", recipe, "--model", str(directory / "model"), *data, "--out", str(out), *settings]


def main(directory: Path) -> None:
    for name in CASES:
        code = run(command(directory, world_size(), name))
        if code:
            sys.exit(code)


def write(directory: Path) -> None:
    """Eleven prompts of several lengths."""
    words = ["red", "green", "blue", "black", "white", "grey"]
    rows = [{"prompt": f"Say {' '.join(words[: i % 6 + 1])} {i}:"} for i in range(11)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "rewards.py").write_text(REWARDS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        main(Path(sys.argv[1]))
