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
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from accord.models.load import load_tokenizer
from accord.models.starter import STARTER
from offline_first import first_step
from offline_plan import KEEP_MEMORY, SOURCES, TASKS, WARMUP, make_plan
from offline_report import ACCORD, BEST, DEFAULTS, PLAIN, Run, answer, fallen, show, summary, unique_tokens, write

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"


@dataclass(frozen=True, slots=True)
class Side:
    """Who trains: a worker script with its arguments, and whether the allocator is set for it from outside."""

    name: str
    command: tuple[str, ...]
    keep_memory: bool


class Written(Protocol):
    """A plan: what all workers of a task read."""

    @property
    def task(self) -> str: ...

    def write(self, path: Path) -> None: ...


_SIDES = (
    Side(ACCORD, ("offline_accord.py",), keep_memory=False),
    Side(BEST, ("offline_trl.py", "best"), keep_memory=True),
    Side(DEFAULTS, ("offline_trl.py", "defaults"), keep_memory=True),
    Side(PLAIN, ("offline_trl.py", "defaults"), keep_memory=False),
)


def main() -> None:
    options = _options()
    require_peer()
    for file in dict.fromkeys(DATA / SOURCES[task] for task in options.tasks):
        if not file.is_file():
            raise SystemExit(
                f"This benchmark needs {os.path.relpath(file)}, which is not there: see benchmarks/README.md."
            )
    tokenizer = load_tokenizer(STARTER)
    results: dict[str, Any] = {}
    for task in options.tasks:
        count = 2 if task not in options.defaults else 4 if options.plain else 3
        plan = make_plan(task, DATA / SOURCES[task], tokenizer, options.steps, options.precision)
        runs = alternate(plan, _SIDES[:count], options.rounds)
        results[task] = summary(plan, runs, unique_tokens(plan, tokenizer))
        show(results[task])
    first = first_step(DATA / SOURCES["sft"], tokenizer, options.rounds) if options.first_step else None
    if options.write:
        write(results, first, HERE / "baselines", options.precision, options.rounds)
    slower = [] if options.write else fallen(results, HERE / "baselines", options.precision)
    print(json.dumps(answer(results, first)))
    if slower:
        raise SystemExit("Under 80 % of the baseline: " + ", ".join(slower))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=_tasks, default=("dpo", "reward", "sft"), help=f"of {','.join(TASKS)}")
    parser.add_argument("--all", action="store_true", help="every task, and the time to the first step")
    parser.add_argument("--first-step", action="store_true", help="also the time from start to first step of SFT")
    parser.add_argument("--steps", type=positive, default=8, help="counted steps, after 2 of warm-up (default: 8)")
    parser.add_argument("--rounds", type=positive, default=2, help="how often every side runs, in turn (default: 2)")
    parser.add_argument(
        "--defaults",
        type=_pair_tasks,
        default=("dpo",),
        help="also TRL as it comes for: dpo,reward,none (default: dpo)",
    )
    parser.add_argument("--plain", action="store_true", help="TRL as it comes also with the plain allocator")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--write", action="store_true", help="write benchmarks/baselines/offline-<cpu>.json")
    options = parser.parse_args()
    if options.all:
        options.tasks, options.first_step = TASKS, True
    return options


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


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def require_peer() -> None:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("1.16."):
        raise SystemExit(
            f"This benchmark compares with TRL 1.16; installed: {version}. Type: pip install 'trl==1.16.*'"
        )


def alternate(plan: Written, sides: Sequence[Side], rounds: int) -> dict[str, list[Run]]:
    """Every side in turn, `rounds` times; fails if two processes did not train on the same tokens."""
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        plan.write(file)
        for number in range(rounds):
            for side in sides:
                began = time.perf_counter()
                run = _work(side, file, Path(directory))
                first = runs[ACCORD][0] if runs[ACCORD] else run
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


def _progress(plan: Written, side: Side, number: int, rounds: int, run: Run, seconds: float) -> None:
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
        shares=rest.get("shares"),
    )


if __name__ == "__main__":
    main()
