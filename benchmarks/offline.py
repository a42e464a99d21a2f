"""Offline training of `starter` by Accord and by TRL 1.16 on the same human preferences, side by side.

    python benchmarks/offline.py --tasks dpo,reward,sft --steps 8 --rounds 2 --write

Both train on the same rows of `hh_harmless/train.jsonl.gz` in the same order from the same weights: all weights, in
float32 with bfloat16 autocast, 4 pairs per step (SFT: the documents of 4 packed rows of 512 tokens), the same AdamW, no
dropout, glibc's allocator told to keep its memory. Every side runs in a process of its own, in turn. The run fails if
the two did not train on the same tokens at every step.

*Useful tokens* are the real tokens of the sequences as TRL lays them out: no padding, and a pair's prompt counted once
per completion. *Unique tokens* count it once: that is what Accord computes. The first two steps are not timed. The
ratio is TRL's total time for the counted steps over Accord's (each step: its median over the rounds).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from offline_plan import WARMUP, Plan, make_plan

from accord.models.load import load_tokenizer
from accord.models.starter import STARTER

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data" / "hh_harmless" / "train.jsonl.gz"
TASKS = ("dpo", "reward", "sft")
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc's settings for the peer; Accord sets its own in process (`accord.models.allocator`)."""


@dataclass(frozen=True, slots=True)
class Side:
    """Who trains: a worker script with its arguments, and whether the allocator is set for it from outside."""

    name: str
    command: tuple[str, ...]
    keep_memory: bool


ACCORD = Side("Accord", ("offline_accord.py",), keep_memory=False)
BEST = Side("TRL at its best", ("offline_trl.py", "best"), keep_memory=True)
DEFAULTS = Side("TRL as it comes", ("offline_trl.py", "defaults"), keep_memory=True)
PLAIN = Side("TRL as it comes, plain allocator", ("offline_trl.py", "defaults"), keep_memory=False)


@dataclass(frozen=True, slots=True)
class Run:
    """What one worker process reported; `other_load` is the share of all cores that others used meanwhile."""

    seconds: list[float]
    losses: list[float]
    tokens: list[int]
    digests: list[str]
    peak_memory: int
    reference_seconds_per_pair: float | None
    other_load: float


def main() -> None:
    options = _options()
    _require_peer()
    if not DATA.is_file():
        raise SystemExit(f"This benchmark needs {os.path.relpath(DATA)} (HH-RLHF, harmless-base), which is not there.")
    tokenizer = load_tokenizer(STARTER)
    results: dict[str, Any] = {}
    for task in options.tasks:
        sides = [ACCORD, BEST]
        if task in options.defaults:
            sides += [DEFAULTS, PLAIN] if options.plain else [DEFAULTS]
        plan = make_plan(task, DATA, tokenizer, options.steps, options.precision)
        runs = _alternate(plan, sides, options.rounds)
        results[task] = _summary(task, plan, runs, _unique_tokens(plan, tokenizer))
        _print_task(task, plan, results[task])
    answer = _answer(results)
    if options.write:
        _write(answer, results, options)
    print(json.dumps(answer))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=_tasks, default=TASKS, help="of dpo,reward,sft (default: all)")
    parser.add_argument("--steps", type=_positive, default=8, help="counted steps, after 2 of warm-up (default: 8)")
    parser.add_argument("--rounds", type=_positive, default=2, help="how often every side runs, in turn (default: 2)")
    parser.add_argument(
        "--defaults",
        type=_pair_tasks,
        default=("dpo",),
        help="also TRL as it comes for: dpo,reward,none (default: dpo)",
    )
    parser.add_argument("--plain", action="store_true", help="TRL as it comes also with the plain allocator")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--write", action="store_true", help="write benchmarks/baselines/offline-<cpu>.json")
    return parser.parse_args()


def _tasks(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(TASKS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(TASKS)}")
    return names


def _pair_tasks(text: str) -> tuple[str, ...]:
    """TRL's SFT defaults train on other batches (unpacked), so there is no step to compare."""
    names = _tasks(text) if text != "none" else ()
    if "sft" in names:
        raise argparse.ArgumentTypeError("TRL as it comes does not pack SFT: its steps hold other rows")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _require_peer() -> None:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("1.16."):
        raise SystemExit(
            f"This benchmark compares with TRL 1.16; installed: {version}. Type: pip install 'trl==1.16.*'"
        )


def _alternate(plan: Plan, sides: Sequence[Side], rounds: int) -> dict[str, list[Run]]:
    """Every side in turn, `rounds` times; fails if two processes did not train on the same tokens."""
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        plan.write(file)
        for number in range(rounds):
            for side in sides:
                began = time.perf_counter()
                run = _work(side, file, Path(directory))
                first = runs[ACCORD.name][0] if runs[ACCORD.name] else run
                different = [
                    i for i, pair in enumerate(zip(first.digests, run.digests, strict=True)) if len(set(pair)) > 1
                ]
                if different:
                    raise SystemExit(
                        f"{plan.task}: {side.name} trained on other tokens than Accord at steps {different}."
                    )
                runs[side.name].append(run)
                _progress(plan, side, number, rounds, run, time.perf_counter() - began)
    return runs


def _progress(plan: Plan, side: Side, number: int, rounds: int, run: Run, seconds: float) -> None:
    per_step = statistics.mean(run.seconds[WARMUP:])
    print(
        f"{plan.task} {number + 1}/{rounds}  {side.name}: {per_step:.2f} s/step, other load {run.other_load:.0%}, "
        f"{seconds:.0f} s in all",
        file=sys.stderr,
        flush=True,
    )


def _work(side: Side, plan: Path, directory: Path) -> Run:
    """Run one worker to its end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= KEEP_MEMORY if side.keep_memory else {}
    script, *arguments = side.command
    log = directory / "worker.log"
    before, own_before, began = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w", encoding="utf-8") as stderr:
        done = subprocess.run(
            [sys.executable, str(HERE / script), str(plan), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise SystemExit(f"{tail}\n{side.name} ended with exit code {done.returncode}.")
    after, own_after = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = sum(after) - after.idle - after.iowait - (sum(before) - before.idle - before.iowait)
    own = own_after.ru_utime + own_after.ru_stime - own_before.ru_utime - own_before.ru_stime
    cores = psutil.cpu_count() or 1
    return _run(done.stdout, max(0.0, busy - own) / (cores * (time.perf_counter() - began)))


def _run(output: str, other_load: float) -> Run:
    lines = [json.loads(line) for line in output.splitlines()]
    steps = [line for line in lines if "loss" in line]
    rest = {name: value for line in lines if "loss" not in line for name, value in line.items()}
    return Run(
        seconds=[step["seconds"] for step in steps],
        losses=[step["loss"] for step in steps],
        tokens=[step["tokens"] for step in steps],
        digests=[step["digest"] for step in steps],
        peak_memory=rest["peak_memory"],
        reference_seconds_per_pair=rest.get("reference_seconds_per_pair"),
        other_load=other_load,
    )


def _unique_tokens(plan: Plan, tokenizer: Any) -> float:
    """Tokens of a counted step when a pair's prompt is counted once."""
    lengths = []
    for prompt, *completions in plan.rows:
        whole = [len(tokenizer(prompt + each + tokenizer.eos_token)["input_ids"]) for each in completions]
        lengths.append(sum(whole) - (len(whole) - 1) * len(tokenizer(prompt)["input_ids"]))
    return statistics.mean(sum(lengths[i] for i in step) for step in plan.steps[WARMUP:])


def _summary(task: str, plan: Plan, runs: dict[str, list[Run]], unique: float) -> dict[str, Any]:
    ours = runs[ACCORD.name]
    tokens = ours[0].tokens[WARMUP:]
    return {
        "task": task,
        "rows_left_out": plan.left_out,
        "useful_tokens_per_step": statistics.mean(tokens),
        "unique_tokens_per_step": unique,
        "sides": {name: _side(side, ours, sum(tokens)) for name, side in runs.items()},
    }


def _side(runs: list[Run], ours: list[Run], tokens: int) -> dict[str, Any]:
    seconds = _per_step(runs)
    by_round = [sum(a.seconds[WARMUP:]) / sum(b.seconds[WARMUP:]) for a, b in zip(runs, ours, strict=True)]
    pairs = zip(runs[0].losses, ours[0].losses, strict=True)
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
        "loss_difference": max(abs(loss - ours_) / abs(ours_) for loss, ours_ in pairs),
        "other_load": max(run.other_load for run in runs),
    }


def _per_step(runs: list[Run]) -> list[float]:
    """Seconds of every counted step: its median over the rounds."""
    return [statistics.median(times) for times in zip(*(run.seconds[WARMUP:] for run in runs), strict=True)]


def _print_task(task: str, plan: Plan, summary: dict[str, Any]) -> None:
    useful, unique = summary["useful_tokens_per_step"], summary["unique_tokens_per_step"]
    print(f"\n{task}: {len(plan.steps) - WARMUP} steps, {useful:,.0f} useful tokens per step ({unique:,.0f} unique)")
    if plan.left_out:
        print(f"{plan.left_out} rows of the file are longer than a packed row and were left out on both sides.")
    print(
        f"{'':34}{'s/step median (min-max)':>26}{'mean':>8}{'useful tok/s':>14}{'peak GB':>9}{'ratio (by round)':>22}"
    )
    for name, side in summary["sides"].items():
        times, rounds = side["seconds_per_step"], side["ratio_by_round"]
        spread = f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})"
        ratio = f"{side['ratio']:.2f} ({min(rounds):.2f}-{max(rounds):.2f})" if name != ACCORD.name else ""
        print(
            f"{name:34}{spread:>26}{times['mean']:>8.2f}{side['useful_tokens_per_second']:>14,.0f}"
            f"{side['peak_memory_gb']:>9.1f}{ratio:>22}"
        )
    for name, side in summary["sides"].items():
        if side["reference_seconds_per_pair"] is not None:
            print(f"{name}: reference log-probabilities, once, {side['reference_seconds_per_pair']:.2f} s per pair")
    names = list(summary["sides"])
    print("loss of step  " + "".join(f"{name:>34}" for name in names))
    for number, losses in enumerate(zip(*(side["losses"] for side in summary["sides"].values()), strict=True), start=1):
        print(f"{number:>12}  " + "".join(f"{loss:>34.5f}" for loss in losses))
    for name, side in summary["sides"].items():
        if name != ACCORD.name:
            print(f"largest relative difference of a loss from Accord's, {name}: {side['loss_difference']:.2%}")
    busiest = max(side["other_load"] for side in summary["sides"].values())
    if busiest > 0.05:
        print(f"Others used up to {busiest:.0%} of the processor meanwhile: do not trust these times.")
    print(flush=True)


def _answer(results: dict[str, Any]) -> dict[str, Any]:
    sides = {task: result["sides"] for task, result in results.items()}
    memory = {
        task: {
            "accord_gb": round(of[ACCORD.name]["peak_memory_gb"], 2),
            "trl_gb": round(of[BEST.name]["peak_memory_gb"], 2),
            "share": round(of[ACCORD.name]["peak_memory_gb"] / of[BEST.name]["peak_memory_gb"], 3),
        }
        for task, of in sides.items()
    }
    ratios = {
        key: {task: round(of[side.name]["ratio"], 2) for task, of in sides.items() if side.name in of}
        for key, side in (("ratio", BEST), ("ratio_defaults", DEFAULTS), ("ratio_defaults_plain", PLAIN))
    }
    difference = {task: round(of[BEST.name]["loss_difference"], 5) for task, of in sides.items()}
    return {**ratios, "memory": memory, "loss_difference": difference}


def _write(answer: dict[str, Any], results: dict[str, Any], options: argparse.Namespace) -> None:
    cpu = _cpu()
    facts = {
        "cpu": cpu,
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("accord", "torch", "transformers", "trl")},
        "commit": _git("rev-parse", "--short", "HEAD")
        + (" with changes" if _git("status", "--porcelain", "src") else ""),
        "command": " ".join(["python benchmarks/offline.py", *sys.argv[1:]]),
        "precision": options.precision,
        "rounds": options.rounds,
    }
    path = HERE / "baselines" / f"offline-{re.sub(r'[^a-z0-9]+', '-', cpu.lower()).strip('-')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**facts, **answer, "tasks": results}, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {os.path.relpath(path)}")


def _cpu() -> str:
    """The processor's name and number of cores."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{found[1] if found else platform.machine()} {psutil.cpu_count()} cores"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
