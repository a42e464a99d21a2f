"""On-policy distillation: the teacher is the reference, whatever is trained, and the policy comes nearer to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from accord.cli import run
from accord.models.tiny import save_tiny
from accord.train.rollouts import RolloutStore


@pytest.fixture
def command(tiny_llama: Path, tmp_path: Path) -> Callable[..., list[str]]:
    rows = [json.dumps({"prompt": f"Say {word}:"}) + "\n" for word in ("red", "green", "blue", "black")]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))

    def make(*settings: str, out: str = "run", more: Sequence[str] = ()) -> list[str]:
        common = ["batch_size=4", "rollout.completions=4", "sampling.max_new_tokens=8", "engine.precision=float32"]
        common += ["samples=0", "optimizer.learning_rate=0.003", "optimizer.warmup=0.0", *settings]
        words = [word for setting in common for word in ("--set", setting)]
        files = ["--data", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / out)]
        return ["train", "distill", "--model", str(tiny_llama), *files, *words, *more]

    return make


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [(), ("--lora",)], ids=["all weights", "LoRA"])
def test_the_kl_is_that_to_the_teacher(more: Sequence[str], command: Callable[..., list[str]], tmp_path: Path) -> None:
    """By the teacher's own weights, as transformers computes them on the first step; no reward, no metric of one."""
    teacher = save_tiny(tmp_path / "teacher", seed=1)
    assert run(command(f"advantage.teacher={teacher}", "steps=1", "sampling.temperature=0.8", more=more)) == 0
    (row,) = metrics(tmp_path / "run")
    store = RolloutStore(tmp_path / "run")
    kept = store.completions(0, range(4))
    store.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    found = []
    for completion in kept.values():
        prompt = tokenizer(prompts[int(completion.prompt_id.rpartition(":")[2]) - 1])["input_ids"]
        tokens = torch.tensor([*prompt, *completion.token_ids])
        with torch.no_grad():
            said = (model(tokens[None, :-1]).logits[0, len(prompt) - 1 :] / 0.8).log_softmax(-1)
        teacher_L = said.gather(1, tokens[len(prompt) :, None])[:, 0].numpy()
        found.append(np.array(completion.logprobs) - teacher_L)
    assert row["teacher/kl"] == pytest.approx(np.concatenate(found).mean(), abs=1e-4)
    assert row["loss"] == pytest.approx(row["teacher/kl"], abs=1e-4)
    assert not [name for name in row if name.startswith(("reward", "objective", "frac_reward"))]


def test_the_policy_comes_nearer_to_its_teacher(command: Callable[..., list[str]], tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", seed=1)
    assert run(command(f"advantage.teacher={teacher}", "steps=40")) == 0
    kls = [row["teacher/kl"] for row in metrics(tmp_path / "run")]
    assert np.mean(kls[-5:]) < 0.7 * np.mean(kls[:5])


def test_what_cannot_teach_is_refused_before_the_run_begins(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = save_tiny(tmp_path / "foreign")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="a"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(foreign)
    cases = [
        (command(), "No teacher is named"),
        (command(f"advantage.teacher={foreign}"), "Its tokens are not those of the policy"),
        (command(f"advantage.teacher={tmp_path}"), "This directory holds no model"),
        (command(f"advantage.teacher={foreign}", more=["--reward", "json_schema"]), "reads no score"),
    ]
    for words_, message in cases:
        assert run(words_) == 1
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists()
