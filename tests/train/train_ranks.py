"""One rank of a job that runs `accord train` several times, started by test_train_ranks.py: `train_ranks.py DIRECTORY`.

Each run stands in DIRECTORY/<world>/<case>.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import accord.data.rows
from accord.cli import run
from accord.engine.distributed import process_group, world_size

# name: (recipe, the files in DIRECTORY that it learns from, its settings)
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "kto": ("kto", ("labels.jsonl",), ()),
    "validation": (
        "reward",
        ("pairs.jsonl",),
        ("validation.share=0.25", "validation.every=2", "validation.patience=2", "epochs=8"),
    ),
    "streamed": ("dpo", ("pairs.jsonl",), ()),
    "mixture": ("sft", ("long.jsonl=2", "short.jsonl=1"), ("neftune_alpha=5",)),
}
STREAMED = ("streamed", "mixture")
# AdamW divides by the size of the gradient: where that is rounding, its sign would decide a whole step.
SETTINGS = (
    "batch_size=5", "epochs=2", "checkpoint_every=4", "samples=0", "engine.precision=float32", "optimizer.epsilon=1e-5",
    "engine.micro_batch_tokens=64", "optimizer.learning_rate=0.003",
)  # fmt: skip


def command(directory: Path, world: int, name: str) -> list[str]:
    recipe, files, more = CASES[name]
    data = [word for file in files for word in ("--data", str(directory / file))]
    settings = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    out = directory / str(world) / name
    return ["train", recipe, "--model", str(directory / "model"), *data, "--out", str(out), *settings]


def main(directory: Path) -> None:
    whole = accord.data.rows.STREAM_ABOVE
    for name in CASES:
        accord.data.rows.STREAM_ABOVE = 10 if name in STREAMED else whole
        code = run(command(directory, world_size(), name))
        if code:
            sys.exit(code)


def write(directory: Path) -> None:
    """24 pairs of 12 prompts, 24 labels of 16 prompts, and demonstrations in two files."""
    words = ["red", "green", "blue", "black", "white", "grey"]
    pairs = [
        {
            "prompt": f"Say {words[i % 6]} {i % 12 + 1} times:",
            "chosen": f" {words[i % 6]}" * (i % 4 + 1),
            "rejected": f" {words[(i + 1) % 6]}" * (i % 3 + 1),
        }
        for i in range(24)
    ]
    labels = [
        {"prompt": f"Say {words[i % 6]}, {i // 2} or so:", "completion": f" {words[i % 5]}", "label": i % 3 > 0}
        for i in range(24)
    ]
    long = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    short = [{"prompt": "Say:", "completion": f" {words[i % 6]} {i}"} for i in range(8)]
    for name, rows in {"pairs": pairs, "labels": labels, "long": long, "short": short}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        main(Path(sys.argv[1]))
