"""Tokens per second of Accord's sampler, of transformers' `generate` and of vLLM's build for CPUs.

Two cases, sampled from `starter` at temperature 1 from the whole vocabulary: 16 short prompts × 4 completions (64
sequences) and 16 prompts of 540 tokens × 8 completions (128 sequences), 64 new tokens each; none stops early. Accord
runs as in training: float32 weights, bfloat16 products, log-probabilities kept. `generate` runs at its best: bfloat16
weights, the attention given by --attention, one call with left padding and `num_return_sequences`; it alternates with
Accord in one process. vLLM (short case; bfloat16, eager, log-probabilities kept) is timed in a process of its own,
before the others. All have the same allocator settings: the process starts itself again with them.

    python benchmarks/sampling.py [--rounds 3] [--attention sdpa] [--write]

The last line of the output is JSON: {"ratio": {"generate", "generate_long", "vllm"}, …}, Accord's tokens per second
over the peer's; `vllm` is null, with a `reason`, where vLLM is not installed (`make .venv-vllm`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from offline_plan import KEEP_MEMORY
from offline_report import circumstances, fallen_ratios
from sampling_sides import Case, Side, accord, generate, long_case, short_case, vllm

BASELINE = Path(__file__).parent / "baselines" / "sampling.json"
Seconds = dict[str, list[float]]


def main() -> None:
    """Measure, print a table, and on the last line the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds after one warm-up round")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="attention of generate")
    parser.add_argument("--write", action="store_true", help=f"write {BASELINE.name} to benchmarks/baselines/")
    arguments = parser.parse_args()
    if any(name not in os.environ for name in KEEP_MEMORY):
        # glibc reads its settings once, before the program starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP_MEMORY, **os.environ})
    from accord.models.load import load_tokenizer

    tokenizer = load_tokenizer("starter")
    cases = {"short": short_case(), "long": long_case(tokenizer)}
    served = vllm(cases["short"], tokenizer, arguments.rounds)
    sides = {"accord": accord(), "generate": generate(arguments.attention)}
    seconds = {name: measure(case, sides, arguments.rounds) for name, case in cases.items()}
    if not isinstance(served, str):
        seconds["short"]["vllm"] = served
    result = summary(cases, seconds) | ({"reason": {"vllm": served}} if isinstance(served, str) else {})
    show(result)
    if arguments.write:
        BASELINE.parent.mkdir(exist_ok=True)
        found = circumstances("sampling.py") | result | {"settings": settings(cases, arguments)}
        BASELINE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    slower = [] if arguments.write else fallen_ratios(result["ratio"], BASELINE)
    print(json.dumps(result))
    if slower:
        raise SystemExit("Under 80 % of the baseline: " + ", ".join(slower))


def measure(case: Case, sides: dict[str, Side], rounds: int) -> Seconds:
    """Seconds of every round after the first; the sides in turn."""
    seconds: Seconds = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            tokens = side(case, round_)
            if round_:
                seconds[name].append(time.perf_counter() - start)
            if tokens != case.tokens:
                raise SystemExit(f"{name} sampled {tokens} tokens, not {case.tokens}: not the same work.")
    return seconds


def summary(cases: dict[str, Case], seconds: dict[str, Seconds]) -> dict[str, Any]:
    """Rates; of `generate` the median of the ratios of each round (both sides of it share what else the machine does),
    of vLLM, which does not alternate, the ratio of the medians."""
    rates = {
        name: {side: _rates(cases[name].tokens, times) for side, times in of.items()} for name, of in seconds.items()
    }
    by_round = {
        "generate": _ratios(seconds["short"]["accord"], seconds["short"]["generate"]),
        "generate_long": _ratios(seconds["long"]["accord"], seconds["long"]["generate"]),
    }
    short, ratio = rates["short"], {name: round(statistics.median(each), 2) for name, each in by_round.items()}
    served = round(short["accord"]["median"] / short["vllm"]["median"], 2) if "vllm" in short else None
    return {
        "ratio": {**ratio, "vllm": served},
        "spread": {name: [round(min(each), 2), round(max(each), 2)] for name, each in by_round.items()},
        "rounds": len(by_round["generate"]),
        "tokens_per_second": rates,
    }


def _rates(tokens: int, seconds: list[float]) -> dict[str, float]:
    values = {"median": statistics.median(seconds), "min": max(seconds), "max": min(seconds)}
    return {name: round(tokens / value, 1) for name, value in values.items()}


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [peer / own for own, peer in zip(ours, theirs, strict=True)]


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'':18}{'tokens/s':>10}{'min':>8}{'max':>8}")
    for case, sides in result["tokens_per_second"].items():
        for name, rate in sides.items():
            print(f"{case + ' ' + name:18}{rate['median']:>10.0f}{rate['min']:>8.0f}{rate['max']:>8.0f}")
    for name, reason in result.get("reason", {}).items():
        print(f"{name}: not measured. {reason}")


def settings(cases: dict[str, Case], arguments: argparse.Namespace) -> dict[str, Any]:
    """What was compared, for the file of results."""
    return {
        **{f"sequences_{name}": case.sequences for name, case in cases.items()},
        "new_tokens": cases["short"].new_tokens,
        "accord": "float32 weights, bfloat16 autocast, log-probabilities kept",
        "generate": f"bfloat16 weights, {arguments.attention} attention, do_sample, num_return_sequences, left padding",
        "vllm": "bfloat16 weights, eager, log-probabilities kept, in a process of its own",
        "allocator": KEEP_MEMORY,
    }


if __name__ == "__main__":
    main()
