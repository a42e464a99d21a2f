"""vLLM's side of `sampling.py`, in the Python that has vLLM: reads a plan, writes seconds and tokens. Started by it.

The engine lives in this process alone and is gone before the other sides run: its idle threads would slow them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(plan_file: str, result_file: str) -> None:
    from vllm import LLM, SamplingParams

    plan = json.loads(Path(plan_file).read_text(encoding="utf-8"))
    sequences = len(plan["prompts"]) * plan["completions"]
    longest = max(map(len, plan["prompts"])) + plan["new_tokens"]
    engine = LLM(
        plan["model"], dtype="bfloat16", enforce_eager=True, max_model_len=longest, max_num_seqs=sequences, seed=0
    )
    settings = SamplingParams(
        n=plan["completions"], temperature=1.0, max_tokens=plan["new_tokens"], ignore_eos=True, logprobs=0
    )
    prompts = [{"prompt_token_ids": ids} for ids in plan["prompts"]]
    seconds, tokens = [], []
    for number in range(plan["rounds"] + 1):
        engine.reset_prefix_cache()  # as for the other sides, the prompts of a round are new
        began = time.perf_counter()
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        spent = time.perf_counter() - began
        if number:
            seconds.append(spent)
            tokens.append(sum(len(answer.token_ids) for output in outputs for answer in output.outputs))
    Path(result_file).write_text(json.dumps({"seconds": seconds, "tokens": tokens}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
