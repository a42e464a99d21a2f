"""Offline training on one GPU by Accord and by TRL 1.16: tokens per second, MFU and peak memory, side by side.

    python benchmarks/gpu.py --sizes 0.5B,1.5B --tasks dpo,dpo_chat,reward,sft --steps 20 --rounds 3

Models have the shape of Qwen2.5 and random weights, all of which are trained: float32 with bfloat16 autocast, fused
AdamW, no dropout. The data is synthetic: random letters, one token each, with lengths drawn from log-normal
distributions around those of public preference data (`LENGTHS`); both sides train on the same rows in the same order.
Every side runs in a process of its own, in turn; the first steps are not timed. TRL runs at its best: no activation
checkpointing, precomputed reference, packing for SFT, FlashAttention and Liger kernels where they are installed.

*Useful tokens* count a pair's prompt once per completion, whatever a side computes. MFU is the work that a side cannot
avoid over the device's peak: 6 · P operations per token of the body (unique tokens for Accord, useful ones for TRL) and
6 · V · D per token that meets the head; attention and the reference pass are left out. The last line is JSON. Without
CUDA the script says so and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from accord.engine.engine import Engine, EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.engine.reference import attach_reference
from accord.losses import LOSSES
from accord.models.load import load_policy, load_reward_model
from accord.models.network import Network
from accord.models.render import Renderer
from accord.models.tiny import tiny_tokenizer
from accord.types import Demonstration, PreferencePair

SIZES: dict[str, dict[str, int]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
VOCABULARY = 151_936
LENGTHS: dict[str, tuple[float, float]] = {
    "dpo": (90, 55),
    "dpo_chat": (170, 300),
    "reward": (90, 55),
    "sft": (170, 300),
}
"""Medians of prompt and completion in tokens; the logarithms have a standard deviation of 0.5."""
BATCH = {"dpo": 32, "dpo_chat": 16, "reward": 32, "sft": 32}
"""Pairs, or demonstrations, of one optimiser step."""
LOSS = {"dpo": "dpo", "dpo_chat": "dpo", "reward": "bradley_terry", "sft": "sft"}
WARMUP = 4
RATE = 1e-6
PACK = 2048
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "L4": 121}
"""Dense bfloat16 TFLOP/s of the makers' data sheets, by part of the device's name."""


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device, and torch sees none. Nothing was measured.")
    if options.worker:
        _work(*options.worker)
        return
    device = torch.cuda.get_device_name()
    peak = options.peak_tflops or next((v for name, v in PEAKS.items() if name in device), None)
    if peak is None:
        raise SystemExit(f"The peak of {device!r} is not known: give it with --peak-tflops.")
    _require_peer()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            model = _write_model(Path(folder), size)
            for task in options.tasks:
                rows = _rows(task, options.steps + WARMUP)
                plan = Path(folder) / f"{size}-{task}.json"
                plan.write_text(json.dumps({"task": task, "model": str(model), "rows": rows}), encoding="utf-8")
                runs = _alternate(plan, options.rounds)
                results[f"{size} {task}"] = _summary(size, task, rows, runs, peak * 1e12)
                print(json.dumps(results[f"{size} {task}"], indent=2), file=sys.stderr)
    names = {
        "device": device,
        "peak_tflops": peak,
        "torch": torch.__version__,
        "trl": importlib.metadata.version("trl"),
    }
    print(json.dumps({**names, "steps": options.steps, "rounds": options.rounds, "results": results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: _names(text, SIZES), default=tuple(SIZES))
    parser.add_argument("--tasks", type=lambda text: _names(text, LOSS), default=tuple(LOSS))
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps, after {WARMUP} of warm-up (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="how often every side runs, in turn (default: 3)")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 TFLOP/s of this device")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "PLAN"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _names(text: str, known: dict[str, Any]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(known)}")
    return names


def _require_peer() -> None:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("1.16."):
        raise SystemExit(f"This compares with TRL 1.16; installed: {version}. Type: pip install 'trl==1.16.*'")


def _write_model(folder: Path, size: str) -> Path:
    """Random weights in the shape of Qwen2.5, with a tokenizer that makes one token of one letter."""
    config = transformers.AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES[size],
    )
    torch.manual_seed(0)
    directory = folder / size
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer(chat_template=None).save_pretrained(directory)
    return directory


def _rows(task: str, steps: int) -> list[list[str]]:
    """(prompt, chosen, rejected) or (prompt, completion), in the order of training."""
    rng = np.random.default_rng(0)
    prompt, completion = LENGTHS[task]

    def text(median: float) -> str:
        length = int(np.clip(rng.lognormal(np.log(median), 0.5), 8, 1000))
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), length))

    texts = 1 if task == "sft" else 2
    return [[text(prompt), *(text(completion) for _ in range(texts))] for _ in range(steps * BATCH[task])]


def _alternate(plan: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {"accord": [], "trl": []}
    for number in range(rounds):
        for side, done in runs.items():
            command = [sys.executable, __file__, "--worker", side, str(plan)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise SystemExit(f"{ran.stderr[-4000:]}\n{side} ended with exit code {ran.returncode}.")
            done.append(json.loads(ran.stdout.strip().splitlines()[-1]))
            seconds = sum(done[-1]["seconds"])
            print(f"{plan.stem} {number + 1}/{rounds} {side}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return runs


def _summary(
    size: str, task: str, rows: list[list[str]], runs: dict[str, list[dict[str, Any]]], peak: float
) -> dict[str, Any]:
    """Each step: its median over the rounds; tokens and operations of the timed rows."""
    timed = rows[WARMUP * BATCH[task] :]
    useful = sum(len(texts) * len(prompt) + sum(map(len, texts)) for prompt, *texts in timed)
    unique = sum(len(prompt) + sum(map(len, texts)) for prompt, *texts in timed)
    heads = 0 if task == "reward" else sum(len(text) + 1 for _, *texts in timed for text in texts)
    shape = SIZES[size]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    body = shape["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner)
    summary: dict[str, Any] = {}
    for side, done in runs.items():
        per_step = [statistics.median(step) for step in zip(*(run["seconds"] for run in done), strict=True)]
        seconds = sum(per_step)
        operations = 6 * body * (unique if side == "accord" else useful) + 6 * VOCABULARY * hidden * heads
        totals = [sum(run["seconds"]) for run in done]
        summary[side] = {
            "tokens_per_second": useful / seconds,
            "spread": [useful / max(totals), useful / min(totals)],
            "mfu": operations / seconds / peak,
            "peak_memory": max(run["peak_memory"] for run in done),
            "reference_seconds": statistics.median(run["reference_seconds"] for run in done),
        }
    ours, theirs = summary["accord"], summary["trl"]
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    return {**summary, "ratio": ratio, "memory": ours["peak_memory"] / theirs["peak_memory"]}


def _work(side: str, path: str) -> None:
    plan = json.loads(Path(path).read_text(encoding="utf-8"))
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints does not mix with the answer
    result = (_accord if side == "accord" else _trl)(plan["task"], plan["model"], plan["rows"])
    output.write(json.dumps({**result, "peak_memory": torch.cuda.max_memory_allocated()}) + "\n")
    output.close()


def _accord(task: str, model: str, rows: list[list[str]]) -> dict[str, Any]:
    network: Network = load_reward_model(model) if task == "reward" else load_policy(model)
    made = Renderer(network).trees([Demonstration(*row) if task == "sft" else PreferencePair(*row) for row in rows])
    trees = [tree for tree in made if not isinstance(tree, Exception)]
    settings, reference = EngineConfig(), 0.0
    if LOSS[task] == "dpo":
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            trees = attach_reference(Engine(network, settings), trees, Path(folder) / "cache.sqlite", lambda *_: None)
        reference = time.perf_counter() - began
    engine = Engine(network, settings, OptimizerConfig(learning_rate=RATE))
    bound = LOSSES[LOSS[task]].bind({})
    seconds = []
    for start in range(0, len(trees), BATCH[task]):
        began = time.perf_counter()
        engine.forward_backward(trees[start : start + BATCH[task]], bound)
        engine.optim_step(RATE)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[WARMUP:], "reference_seconds": reference}


def _trl(task: str, model: str, rows: list[list[str]]) -> dict[str, Any]:
    import trl
    from datasets import Dataset

    names = ("prompt", "completion") if task == "sft" else ("prompt", "chosen", "rejected")
    data = Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    kind = {"dpo": "DPO", "dpo_chat": "DPO", "reward": "Reward", "sft": "SFT"}[task]
    flash = importlib.util.find_spec("flash_attn") is not None
    steps = len(rows) // BATCH[task]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "bf16": True,
            "gradient_checkpointing": False,
            "optim": "adamw_torch_fused",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": BATCH[task],
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "dataloader_num_workers": 2,
            "use_liger_kernel": importlib.util.find_spec("liger_kernel") is not None and task != "reward",
            "model_init_kwargs": {"attn_implementation": "flash_attention_2" if flash else "sdpa", "dtype": "float32"},
        }
        if kind == "SFT":
            # As many packed rows per step as hold one step's tokens of Accord; the timed rows are the same in all.
            tokens = sum(len(prompt) + len(text) + 1 for prompt, text in rows)
            packed = max(1, round(tokens / steps / PACK))
            options |= {
                "packing": True,
                "max_length": PACK,
                "per_device_train_batch_size": packed,
                "num_train_epochs": 1,
            }
        else:
            options |= {"max_steps": steps, "max_length": 2 * PACK}  # longer than any row: none is cut or left out
        if kind == "DPO":
            options |= {"precompute_ref_log_probs": True}
        trainer_class: Any = getattr(trl, f"{kind}Trainer")
        began = time.perf_counter()
        trainer = trainer_class(
            model=model, args=getattr(trl, f"{kind}Config")(**options), train_dataset=data, callbacks=[clock]
        )
        trainer._get_train_sampler = lambda dataset=None: range(len(dataset or trainer.train_dataset))
        trainer.train()
    reference = clock.started - began if kind == "DPO" else 0.0
    return {"seconds": _same_number(clock.seconds, steps), "reference_seconds": reference}


def _same_number(seconds: list[float], steps: int) -> list[float]:
    """Packed rows may make a step more or fewer: the time per token counts, so all of it is spread over the steps."""
    timed = seconds[WARMUP:]
    share = len(seconds) / steps
    return [sum(timed) / len(timed) * share] * (steps - WARMUP)


class _Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """Seconds from the beginning of every optimiser step to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.started = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


if __name__ == "__main__":
    main()
