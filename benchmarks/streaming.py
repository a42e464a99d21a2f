"""A million rows: seconds from the start of `accord train sft` to its first step, and memory from then on.

    python benchmarks/streaming.py --rows 1000000 --steps 300

Writes synthetic demonstrations (conversations of about 100 words, 0.7 kB a row) into a temporary directory and trains a
tiny random model on them (cut at 128 bytes, so that steps are short), with an empty cache and then with the cache of
the first run. The clock starts before the process does and stops at the first row of `metrics.jsonl`. Memory is the
resident set of the process, read every 50 ms; the figure is its growth from step 150 (all buffers in use) to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from accord.models.tiny import save_tiny

_WARM = 150
"""Steps after which memory should no longer grow."""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model, data = save_tiny(root / "model", max_position_embeddings=2048), root / "rows.jsonl"
        _write_rows(data, options.rows)
        print(f"{options.rows:,} rows, {data.stat().st_size / 1e6:,.0f} MB")
        results = {}
        for name in ("empty cache", "second run"):
            results[name] = result = _measure(root, name, model, data, options.steps)
            memory = f"{result['warm_mb']:,.0f} MB at step {_WARM}, {result['growth_mb']:+.0f} MB at the end"
            print(f"{name}: first step after {result['first_step_s']:.1f} s; memory {memory}", flush=True)
    print(json.dumps({"rows": options.rows, "steps": options.steps, **results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=300, help=f"optimiser steps, more than {_WARM} (default: 300)")
    return parser.parse_args()


def _write_rows(path: Path, count: int) -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(5000)]
    short, long = ([" ".join(generator.choices(words, k=k)) for _ in range(5000)] for k in (5, 95))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = f"{number} {generator.choice(short)}?", generator.choice(long)
            turns = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
            file.write(json.dumps({"prompt": turns[0], "completion": turns[1]}) + "\n")


def _measure(root: Path, name: str, model: Path, data: Path, steps: int) -> dict[str, float]:
    out = root / name.replace(" ", "-")
    command = [sys.executable, "-m", "accord", "train", "sft", "--model", str(model), "--data", str(data)]
    command += [
        "--out",
        str(out),
        "--set",
        f"max_steps={steps}",
        "--set",
        "checkpoint_every=1000000",
        "--set",
        "max_tokens=128",
    ]
    environment = {**os.environ, "ACCORD_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    metrics, memory, first = out / "metrics.jsonl", {}, 0.0
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if done and not first:
            first = time.perf_counter() - began
        try:
            memory[done] = watched.memory_info().rss / 1e6
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if process.wait() != 0:
        raise SystemExit(f"The run failed: {' '.join(command)}")
    warm = next(memory[step] for step in sorted(memory) if step >= _WARM)
    last = memory[max(step for step in memory if step < steps)]
    return {"first_step_s": first, "warm_mb": warm, "last_mb": last, "growth_mb": last - warm}


if __name__ == "__main__":
    main()
