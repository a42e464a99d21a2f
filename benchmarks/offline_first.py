"""How long a newcomer waits: from the start of the process to the end of the first optimiser step of SFT.

Both sides read the same 1,595 demonstrations as one JSON-lines file and train `starter` on about 2,000 tokens a step:
Accord by its command (without samples of the untrained model, which TRL does not write either), TRL by a script of ten
lines that packs them (`offline_trl.py first`). Nothing is cached from
round to round but the converted weights.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offline_plan import KEEP_MEMORY, make_plan

__all__ = ["first_step"]

HERE = Path(__file__).resolve().parent
_DOCUMENTS = 12
"""Demonstrations of about 160 tokens: as many tokens as TRL's 4 packed rows of 512 hold."""
_PATIENCE = 600.0


def first_step(data: Path, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """Seconds to the first step by side, and Accord's share of TRL's; sides in turn."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        file = folder / "demonstrations.jsonl"
        rows = make_plan("dpo", data, tokenizer, 396, "bfloat16").rows
        lines = [json.dumps({"prompt": prompt, "completion": chosen}) for prompt, chosen, _ in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        seconds: dict[str, list[float]] = {"accord": [], "trl": []}
        for number in range(rounds):
            out = folder / f"run-{number}"
            ours = ["-m", "accord", "train", "sft", "--model", "starter", "--data", str(file), "--out", str(out)]
            ours += ["--set", f"batch_size={_DOCUMENTS}", "--set", "samples=0"]
            seconds["accord"].append(_until(ours, lambda out=out: _has_line(out / "metrics.jsonl"), {}))  # type: ignore[misc]
            done = folder / f"trl-{number}"
            peer = [str(HERE / "offline_trl.py"), "first", str(file), str(done)]
            seconds["trl"].append(
                _until(peer, done.exists, {**KEEP_MEMORY, "HF_DATASETS_CACHE": str(folder / f"cache-{number}")})
            )
    result = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"first step: Accord {result['accord']:.1f} s, TRL {result['trl']:.1f} s after the start", flush=True)
    return {"ratio": round(result["accord"] / result["trl"], 3), "seconds": seconds}


def _has_line(path: Path) -> bool:
    return path.exists() and path.read_text(encoding="utf-8").endswith("\n")


def _until(arguments: list[str], happened: Callable[[], bool], environment: dict[str, str]) -> float:
    """Seconds from the start of a process until something happened; the process is ended then."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], env=settings, stdout=log, stderr=log)
        try:
            while not happened():
                if process.poll() is not None or time.perf_counter() - began > _PATIENCE:
                    log.seek(0)
                    raise SystemExit(f"No first step was taken:\n{log.read()[-3000:]}")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()
