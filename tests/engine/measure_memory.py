"""Three steps on a random model of 30 million weights: predicted and measured growth of resident memory, as JSON.

Started by `test_memory.py` in a process of its own, so that nothing else has shaped the heap.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch

from accord.engine.engine import Engine, EngineConfig
from accord.engine.memory import Load, MemoryModel
from accord.engine.optimizer import OptimizerConfig
from accord.losses import LOSSES
from accord.models.load import load_policy
from accord.models.lora import LoRAConfig, add_lora
from accord.models.packing import pack
from accord.models.tiny import save_tiny
from accord.models.trees import Branch, Tree

LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
SHAPES: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "qwen2": {**LLAMA, "hidden_size": 256, "vocab_size": 32000, "num_hidden_layers": 12},
    "gpt2": {"vocab_size": 8192, "n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 1024},
}


def pair(rng: np.random.Generator) -> Tree:
    branches = []
    for length in rng.integers(150, 200, 2):
        mask = np.ones(length, bool)
        branches.append(Branch(rng.integers(3, 8000, length), mask, np.full(length, -9.0, np.float32)))
    return Tree(rng.integers(3, 8000, int(rng.integers(60, 100))), tuple(branches), ranks=(0, 1))


def peak() -> int:
    """Largest resident set so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(architecture: str, precision: str, again: bool, lora: bool) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder), architecture, **SHAPES[architecture])
        before = psutil.Process().memory_info().rss
        network = load_policy(folder, device=torch.device("cpu"))
    if lora:
        add_lora(network, LoRAConfig())
    config = EngineConfig.build({"precision": precision, "activation_checkpointing": "on" if again else "off"})
    model = MemoryModel.of(network, {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision])
    engine = Engine(network, config, OptimizerConfig())
    largest = Load(0, 0, 0)
    for _ in range(3):
        trees = [pair(rng) for _ in range(5)]
        loads = [Load.of(batch, network) for batch in pack(trees, engine.tokens)]
        largest = max(*loads, largest, key=lambda load: load.tokens)
        engine.forward_backward(trees, LOSSES["dpo"].bind({}))
        engine.optim_step(1e-5)
    memory = model.training(largest, checkpointing=again, accumulates=True)
    print(json.dumps({"predicted": memory.total - memory.program, "heap": memory.heap, "measured": peak() - before}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
