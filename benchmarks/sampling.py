"""Tokens per second of Accord's sampler and of transformers' `generate`, alternating in one process.

64 sequences (16 prompts × 4 completions) of 64 new tokens from `starter`, temperature 1, the whole vocabulary.
`generate` runs at its best: bfloat16 weights, the attention given by --attention, one call with left padding and
`num_return_sequences=4`. Accord runs as in training: float32 weights, bfloat16 products, log-probabilities kept.
Neither stops early. Both have the same allocator settings: the process starts itself again with them.

    python benchmarks/sampling.py [--rounds 3] [--attention sdpa] [--write]

The last line of the output is JSON: {"ratio": {"generate": …}, …}, Accord's tokens per second over the peer's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
BASELINE = Path(__file__).parent / "baselines" / "sampling.json"
COMPLETIONS = 4
NEW_TOKENS = 64
PROMPTS = [
    "Suggest a name for a small bakery by the sea, and say why it fits.",
    "Explain in two sentences why the sky turns red at sunset.",
    "My neighbour's dog barks at night. Write a polite note that I can leave at the door.",
    "List five things to pack for a day in the mountains.",
    "What is the difference between a fruit and a vegetable?",
    "Write the opening line of a mystery set in a library.",
    "How do I remove a coffee stain from a cotton shirt?",
    "Tell me one fact about octopuses that most people do not know.",
    "Give me three questions to ask at the end of a job interview.",
    "Describe the smell of rain to someone who has never smelled it.",
    "I have rice, eggs and an onion. What can I cook in twenty minutes?",
    "Translate into French: The train to Lyon leaves at half past nine.",
    "Why do we have leap years? Keep it short.",
    "Write a four-line poem about an old bicycle.",
    "What should I check before I buy a used car from a private seller?",
    "Summarise the story of the tortoise and the hare in one sentence.",
]


def main() -> None:
    """Measure, print a table, and on the last line the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds after one warm-up round")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="attention of generate")
    parser.add_argument("--write", action="store_true", help=f"write {BASELINE.name} to benchmarks/baselines/")
    arguments = parser.parse_args()
    if any(name not in os.environ for name in ALLOCATOR):
        # glibc reads its settings once, before the program starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**ALLOCATOR, **os.environ})
    sides = {"accord": accord(), "generate": generate(arguments.attention)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(arguments.rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            tokens = side(round_)
            if round_:
                seconds[name].append(time.perf_counter() - start)
            if tokens != len(PROMPTS) * COMPLETIONS * NEW_TOKENS:
                raise SystemExit(f"{name} sampled {tokens} tokens: not the same work.")
    result = summary(seconds)
    print(f"{'':10}{'tokens/s':>10}{'min':>8}{'max':>8}")
    for name, rate in result["tokens_per_second"].items():
        print(f"{name:10}{rate['median']:>10.0f}{rate['min']:>8.0f}{rate['max']:>8.0f}")
    if arguments.write:
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(json.dumps(result | where(arguments.attention), indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def accord() -> Callable[[int], int]:
    """Accord's sampler, without a stop token."""
    from accord.models.load import load_policy
    from accord.models.network import Policy
    from accord.models.render import Renderer
    from accord.sampling.local import LocalSampler
    from accord.sampling.request import SamplingConfig, requests_for
    from accord.types import Message, Prompt

    class Endless(Policy):
        """Equal work on both sides: no token stops a completion."""

        stop_ids = ()

    loaded = load_policy("starter")
    policy = Endless(loaded.model, loaded.tokenizer, branching=loaded.branching)
    prompts = [Prompt(f"p{index}", (Message("user", text),)) for index, text in enumerate(PROMPTS)]
    sampler = LocalSampler(policy, "bfloat16")
    config = SamplingConfig(max_new_tokens=NEW_TOKENS, max_batch=len(PROMPTS) * COMPLETIONS)
    renderer = Renderer(policy)

    def run(seed: int) -> int:
        completions = sampler.sample(requests_for(prompts, renderer, [1.0] * COMPLETIONS, seed), config)
        return sum(len(completion.token_ids) for completion in completions)

    return run


def generate(attention: str) -> Callable[[int], int]:
    """transformers' `generate`, without a stop token."""
    import torch
    import transformers

    from accord.models.starter import starter_directory

    directory = starter_directory()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation=attention
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    model.generation_config.eos_token_id = None

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=COMPLETIONS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
        return ids[:, length:].numel()

    return run


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Rates, and the median of the ratios of each round (both sides of a round share what else the machine does)."""
    tokens = len(PROMPTS) * COMPLETIONS * NEW_TOKENS
    rates = {
        name: {
            "median": round(tokens / statistics.median(times), 1),
            "min": round(tokens / max(times), 1),
            "max": round(tokens / min(times), 1),
        }
        for name, times in seconds.items()
    }
    ratios = [peer / ours for ours, peer in zip(seconds["accord"], seconds["generate"], strict=True)]
    return {
        "ratio": {"generate": round(statistics.median(ratios), 2)},
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "rounds": len(ratios),
        "tokens_per_second": rates,
    }


def where(attention: str) -> dict[str, Any]:
    """The machine, the commit and the versions of a result."""
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "processor": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": {
            "sequences": len(PROMPTS) * COMPLETIONS,
            "new_tokens": NEW_TOKENS,
            "accord": "float32 weights, bfloat16 autocast, log-probabilities kept",
            "generate": f"bfloat16 weights, {attention} attention, do_sample, num_return_sequences=4, left padding",
            "allocator": ALLOCATOR,
        },
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()
