"""One rank of a job that runs online recipes, started by test_online_ranks.py: `online_ranks.py DIRECTORY`.

Each run stands in DIRECTORY/<world>/<case>.
"""

from __future__ import annotations

import json
import os
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
    "critic": (
        "ppo",
        (
            "loss.name=ppo_clip",
            "critic.model='REWARD'",
            "rewards=[{name='reward_model', model='REWARD'}]",
            "engine.sharding.strategy=grad",
        ),
    ),
    "dapo": ("dapo", ("rollout.dynamic_sampling=2", "rollout.completions=2")),
    "online_dpo": ("online_dpo", ("lora.rank=3",)),
    # A server samples, to which the first rank sends an adapter.
    "ahead": (
        "grpo",
        ("lora.rank=3", "rollout.max_staleness=1", "sampler.url='SERVER'", "sampler.exchange='EXCHANGE'"),
    ),
}
# AdamW divides by the size of the gradient: where that is rounding, its sign would decide a whole step.
SETTINGS = (
    "steps=3", "batch_size=5", "checkpoint_every=2", "samples=2", "engine.precision=float32", "optimizer.epsilon=1e-5",
    "engine.micro_batch_tokens=64", "optimizer.learning_rate=0.003", "sampling.max_new_tokens=7",
)  # fmt: skip

REWARDS = """
from pathlib import Path

def once(prompts, completions):
    "Fails at its third call."
    calls = Path(__file__).with_name("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if calls.read_text() == "...":
        raise OSError("no such sensor")
    return half(prompts, completions)

def half(prompts, completions):
    "The share of even tokens, in fifths; nothing of a completion that begins with one of a few tokens."
    return [
        None if c.token_ids[0] % 7 == 0 else round(5 * sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids)) / 5
        for c in completions
    ]
"""


def command(directory: Path, world: int, name: str, out: str = "", reward: str = "half") -> list[str]:
    """The command of a case; DIRECTORY/server<world> holds the address of a server that samples."""
    recipe, more = CASES[name]
    settings = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    server = directory / f"server{world}"
    places = {"REWARD": directory / "reward", "EXCHANGE": directory / f"exchange{world}"}
    places |= {"SERVER": server.read_text()} if server.exists() else {}
    for word, place in places.items():
        settings = [setting.replace(word, str(place)) for setting in settings]
    data = ["--data", str(directory / "prompts.jsonl")]
    if not any(setting.startswith("rewards=") for setting in more):
        data += ["--reward", f"{directory / 'rewards.py'}:{reward}"]
    if world == 1 and "engine.sharding.strategy=grad" in settings:
        where = settings.index("engine.sharding.strategy=grad")
        del settings[where - 1 : where + 1]
    return [
        "train",
        recipe,
        "--model",
        str(directory / "model"),
        *data,
        "--out",
        str(directory / str(world) / (out or name)),
        *settings,
    ]


def main(directory: Path) -> None:
    for name in CASES:
        code = run(command(directory, world_size(), name))
        if code:
            sys.exit(code)
    fail(directory)


def fail(directory: Path) -> None:
    """Step 3 fails on rank 0: every rank ends its command with code 1, and its part in the job."""
    try:
        code = run(command(directory, world_size(), "grpo", "failed", "once"))
    except SystemExit as stop:
        code = int(str(stop.code))
    sys.stdout.flush()
    os._exit(0 if code == 1 else 1)


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
