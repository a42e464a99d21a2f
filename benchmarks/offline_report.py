"""What `offline.py` reports: the table, the line of JSON, the file in `baselines/`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from offline_plan import WARMUP, Plan

__all__ = [
    "ACCORD",
    "BEST",
    "DEFAULTS",
    "PLAIN",
    "Run",
    "answer",
    "baseline",
    "circumstances",
    "fallen",
    "fallen_ratios",
    "show",
    "summary",
    "unique_tokens",
    "write",
]

ACCORD = "Accord"
BEST = "TRL at its best"
DEFAULTS = "TRL as it comes"
PLAIN = "TRL as it comes, plain allocator"


@dataclass(frozen=True, slots=True)
class Run:
    """What one worker process reported; `other_load` is the share of all cores that others used meanwhile.

    `shares`: what a counted step spends its time on, where the worker says.
    """

    seconds: list[float]
    losses: list[float]
    tokens: list[int]
    digests: list[str]
    peak_memory: int
    reference_seconds_per_pair: float | None
    other_load: float
    shares: dict[str, float] | None = None


def unique_tokens(plan: Plan, tokenizer: Any) -> float:
    """Tokens of a counted step when the prompt of several completions is counted once (SFT: every time)."""

    def size(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    def of_step(rows: Sequence[Sequence[str]]) -> int:
        total, seen = 0, set()
        for prompt, *completions in rows:
            for completion in completions[:1] if plan.task == "kto" else completions:
                whole = size(prompt + completion + tokenizer.eos_token)
                total += whole - size(prompt) if prompt in seen else whole
                seen |= {prompt} if plan.task != "sft" else set()
        return total

    return statistics.mean(of_step([plan.rows[i] for i in step]) for step in plan.steps[WARMUP:])


def summary(plan: Plan, runs: dict[str, list[Run]], unique: float) -> dict[str, Any]:
    """Everything that is reported of one task; `unique` is its unique tokens per step."""
    ours = runs[ACCORD]
    tokens = ours[0].tokens[WARMUP:]
    return {
        "task": plan.task,
        "steps": len(plan.steps) - WARMUP,
        "rows_left_out": plan.left_out,
        "useful_tokens_per_step": statistics.mean(tokens),
        "unique_tokens_per_step": unique,
        "sides": {name: _side(side, ours, sum(tokens)) for name, side in runs.items()},
    }


def _side(runs: list[Run], ours: list[Run], tokens: int) -> dict[str, Any]:
    seconds = _per_step(runs)
    by_round = [sum(a.seconds[WARMUP:]) / sum(b.seconds[WARMUP:]) for a, b in zip(runs, ours, strict=True)]
    pairs = list(zip(runs[0].losses, ours[0].losses, strict=True))
    return {
        "seconds_per_step": {
            "mean": statistics.mean(seconds),
            "median": statistics.median(seconds),
            "min": min(second for run in runs for second in run.seconds[WARMUP:]),
            "max": max(second for run in runs for second in run.seconds[WARMUP:]),
        },
        "useful_tokens_per_second": tokens / sum(seconds),
        "peak_memory_gb": max(run.peak_memory for run in runs) / 1e9,
        "reference_seconds_per_pair": runs[0].reference_seconds_per_pair,
        "ratio": sum(seconds) / sum(_per_step(ours)),
        "ratio_by_round": by_round,
        "losses": runs[0].losses,
        "loss_difference": max(abs(theirs / our - 1) for theirs, our in pairs),
        "mean_loss_difference": abs(sum(theirs for theirs, _ in pairs) / sum(our for _, our in pairs) - 1),
        "other_load": max(run.other_load for run in runs),
    }


def _per_step(runs: list[Run]) -> list[float]:
    """Seconds of every counted step: its median over the rounds."""
    return [statistics.median(times) for times in zip(*(run.seconds[WARMUP:] for run in runs), strict=True)]


def show(result: dict[str, Any]) -> None:
    """Print the table of one task."""
    useful, unique = result["useful_tokens_per_step"], result["unique_tokens_per_step"]
    print(f"\n{result['task']}: {result['steps']} steps, {useful:,.0f} useful tokens per step ({unique:,.0f} unique)")
    if result["rows_left_out"]:
        print(f"{result['rows_left_out']} rows of the file are longer than a packed row: left out on both sides.")
    print(
        f"{'':34}{'s/step median (min-max)':>26}{'mean':>8}{'useful tok/s':>14}{'peak GB':>9}{'ratio (by round)':>22}"
    )
    for name, side in result["sides"].items():
        times, rounds = side["seconds_per_step"], side["ratio_by_round"]
        spread = f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})"
        ratio = f"{side['ratio']:.2f} ({min(rounds):.2f}-{max(rounds):.2f})" if name != ACCORD else ""
        print(
            f"{name:34}{spread:>26}{times['mean']:>8.2f}{side['useful_tokens_per_second']:>14,.0f}"
            f"{side['peak_memory_gb']:>9.1f}{ratio:>22}"
        )
    for name, side in result["sides"].items():
        if side["reference_seconds_per_pair"] is not None:
            print(f"{name}: reference log-probabilities, once, {side['reference_seconds_per_pair']:.2f} s per pair")
    names = list(result["sides"])
    print("loss of step  " + "".join(f"{name:>34}" for name in names))
    for number, losses in enumerate(zip(*(side["losses"] for side in result["sides"].values()), strict=True), start=1):
        print(f"{number:>12}  " + "".join(f"{loss:>34.5f}" for loss in losses))
    for name, side in result["sides"].items():
        if name != ACCORD:
            print(
                f"loss against Accord's, {name}: largest relative difference of a step {side['loss_difference']:.2%}, "
                f"of the mean over all steps {side['mean_loss_difference']:.2%}"
            )
    busiest = max(side["other_load"] for side in result["sides"].values())
    if busiest > 0.05:
        print(f"Others used up to {busiest:.0%} of the processor meanwhile: do not trust these times.")
    print(flush=True)


def answer(results: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """The last line of the output: TRL's time over ours, our peak memory and time to the first step over TRL's."""
    sides = {task: result["sides"] for task, result in results.items()}
    memory = {task: round(of[ACCORD]["peak_memory_gb"] / of[BEST]["peak_memory_gb"], 3) for task, of in sides.items()}
    ratios = {
        key: {task: round(of[side]["ratio"], 2) for task, of in sides.items() if side in of}
        for key, side in (("ratio", BEST), ("ratio_defaults", DEFAULTS), ("ratio_defaults_plain", PLAIN))
    }
    differences = {
        key: {task: round(of[BEST][key], 5) for task, of in sides.items()}
        for key in ("loss_difference", "mean_loss_difference")
    }
    return {**ratios, "memory": memory, "first_step": first and first["ratio"], **differences}


def fallen(results: dict[str, Any], directory: Path, precision: str) -> list[str]:
    """Tasks whose ratio is under 80 % of this machine's baseline, where there is one of this precision."""
    path = baseline(directory, "offline")
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return fallen_ratios(answer(results, None)["ratio"], path) if found.get("precision") == precision else []


def fallen_ratios(now: Mapping[str, float | None], path: Path) -> list[str]:
    """Those under 80 % of the file's, where the file is of a processor like this one."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = found["ratio"] if found.get("cpu") == _cpu() else {}
    return [
        f"{name} {ratio} (was {before[name]})"
        for name, ratio in now.items()
        if ratio is not None and before.get(name) is not None and ratio < 0.8 * before[name]
    ]


def write(results: dict[str, Any], first: dict[str, Any] | None, directory: Path, precision: str, rounds: int) -> None:
    """Write results and circumstances to `directory`/offline-<cpu>.json."""
    path = baseline(directory, "offline")
    path.parent.mkdir(exist_ok=True)
    facts = {**circumstances("offline.py", "trl"), "precision": precision, "rounds": rounds}
    found = {**facts, **answer(results, first), "first": first, "tasks": results}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {os.path.relpath(path)}")


def circumstances(script: str, *peers: str) -> dict[str, Any]:
    """Machine, versions (also those of `peers`), commit and command of a result of `script`."""
    return {
        "cpu": _cpu(),
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("accord", "torch", "transformers", *peers)},
        "commit": _git("rev-parse", "--short", "HEAD")
        + (" with changes" if _git("status", "--porcelain", ":/src") else ""),
        "command": " ".join([f"python benchmarks/{script}", *sys.argv[1:]]),
    }


def baseline(directory: Path, name: str) -> Path:
    """The file of this processor's results: `directory`/NAME-CPU.json."""
    return directory / f"{name}-{re.sub(r'[^a-z0-9]+', '-', _cpu().lower()).strip('-')}.json"


def _cpu() -> str:
    """The processor's name and number of cores."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{found[1] if found else platform.machine()} {psutil.cpu_count()} cores"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False
    ).stdout.strip()
