"""The cases and the sides of `sampling.py`: what is sampled, and by whom.

Every side takes the same chats, gives every prompt so many completions of so many tokens, and never stops early.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offline_plan import KEEP_MEMORY

__all__ = ["Case", "Side", "accord", "generate", "long_case", "short_case", "vllm"]

HERE = Path(__file__).resolve().parent
NEW_TOKENS = 64
LONG = 540
"""Tokens of a long prompt, at least, without the chat template around it."""
TEXTS = (
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
)


@dataclass(frozen=True, slots=True)
class Case:
    """What a round samples: `completions` of `new_tokens` tokens for each text, which is a user's message."""

    texts: tuple[str, ...]
    completions: int
    new_tokens: int = NEW_TOKENS

    @property
    def sequences(self) -> int:
        return len(self.texts) * self.completions

    @property
    def tokens(self) -> int:
        return self.sequences * self.new_tokens


Side = Callable[[Case, int], int]
"""Samples a case with a seed; returns how many tokens it has sampled."""


def short_case() -> Case:
    """16 questions × 4 completions."""
    return Case(TEXTS, 4)


def long_case(tokenizer: Any) -> Case:
    """16 prompts of 540 tokens × 8 completions. Each begins with another question, so that no two share a prefix."""
    texts = []
    for first in range(len(TEXTS)):
        ids: list[int] = []
        while len(ids) < LONG:
            ids += tokenizer(" ".join(TEXTS[first:] + TEXTS[:first]) + " ")["input_ids"]
        texts.append(tokenizer.decode(ids[:LONG]))
    return Case(tuple(texts), 8)


def accord() -> Side:
    """Accord's sampler, without a stop token."""
    from accord.models.load import load_policy
    from accord.models.network import Policy
    from accord.models.render import Renderer
    from accord.sampling.local import LocalSampler
    from accord.sampling.request import SamplingConfig, requests_for
    from accord.types import Message, Prompt

    class Endless(Policy):
        """Equal work on all sides: no token stops a completion."""

        stop_ids = ()

    loaded = load_policy("starter")
    policy = Endless(loaded.model, loaded.tokenizer, branching=loaded.branching)
    sampler, renderer = LocalSampler(policy, "bfloat16"), Renderer(policy)

    def run(case: Case, seed: int) -> int:
        prompts = [Prompt(f"p{index}", (Message("user", text),)) for index, text in enumerate(case.texts)]
        config = SamplingConfig(max_new_tokens=case.new_tokens, max_batch=case.sequences)
        completions = sampler.sample(requests_for(prompts, renderer, [1.0] * case.completions, seed), config)
        return sum(len(completion.token_ids) for completion in completions)

    return run


def generate(attention: str) -> Side:
    """transformers' `generate`, without a stop token."""
    import torch
    import transformers

    from accord.models.starter import starter_directory

    directory = starter_directory()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation=attention
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    model.generation_config.eos_token_id = None

    def run(case: Case, seed: int) -> int:
        torch.manual_seed(seed)
        inputs = tokenizer.apply_chat_template(
            _chats(case), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=case.completions,
                max_new_tokens=case.new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
        return ids[:, length:].numel()

    return run


def vllm(case: Case, tokenizer: Any, rounds: int) -> list[float] | str:
    """Seconds of every round of vLLM's build for CPUs in a process of its own; or why there are none."""
    from accord.models.starter import starter_directory

    python = Path(os.environ.get("ACCORD_VLLM_PYTHON", HERE.parent / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        return "vLLM is not installed: make .venv-vllm, or set ACCORD_VLLM_PYTHON to a Python that has it"
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in _chats(case)]
    plan = asdict(case) | {"prompts": ids, "rounds": rounds, "model": str(starter_directory())}
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **KEEP_MEMORY}
    with tempfile.TemporaryDirectory() as directory:
        file, out, log = (Path(directory) / name for name in ("plan.json", "result.json", "log"))
        file.write_text(json.dumps(plan), encoding="utf-8")
        command = [str(python), str(HERE / "sampling_vllm.py"), str(file), str(out)]
        with log.open("w", encoding="utf-8") as said:
            code = subprocess.run(command, env=kept | settings, stdout=said, stderr=said, check=False).returncode
        if code or not out.exists():
            raise SystemExit(f"{log.read_text(encoding='utf-8', errors='replace')[-3000:]}\nvLLM ended with {code}.")
        found = json.loads(out.read_text(encoding="utf-8"))
    if set(found["tokens"]) != {case.tokens}:
        raise SystemExit(f"vllm sampled {found['tokens']} tokens, not {case.tokens}: not the same work.")
    seconds: list[float] = found["seconds"]
    return seconds


def _chats(case: Case) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in case.texts]
