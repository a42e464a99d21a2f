"""Critics and reward models of online runs: where they start, what they read, and how an earlier run's go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from accord.cli import run
from accord.errors import ConfigError
from accord.models.tiny import save_tiny, tiny_model, tiny_tokenizer
from accord.train import resolve_online
from accord.train.rollouts import RolloutStore
from accord.types import Completion

PROMPTS = [[{"role": "user", "content": f"Say {word}."}] for word in ("red", "green", "blue", "black")]
# A special token stands before every content: no token of it reaches across.
TEMPLATE = "{% for m in messages %}{{ m['role'] }}<end>{{ m['content'] }}<end>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant<end>{% endif %}"


def save_classifier(path: Path, tokenizer: Any, seed: int) -> Path:
    """A sequence classifier with a random head, as any library writes one."""
    config = tiny_model("llama", vocab_size=len(tokenizer)).config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy, a reward model with its tokens, and one with tokens and a template of its own."""
    directory = tmp_path_factory.mktemp("family")
    other = Tokenizer(models.BPE())
    other.pre_tokenizer, other.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = trainers.BpeTrainer(vocab_size=270, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet)
    other.train_from_iterator(["user assistant Say Say red green blue"], words)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=other, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in PROMPTS))
    return {
        "prompts": directory / "prompts.jsonl",
        "policy": save_tiny(directory / "policy"),
        "reward": save_classifier(directory / "reward", tiny_tokenizer(), seed=1),
        "foreign": save_classifier(directory / "foreign", fast, seed=2),
    }


@pytest.fixture
def ppo(family: dict[str, Path]) -> Callable[..., list[str]]:
    """`accord train ppo` of two steps with one epoch each, on the scores of the foreign reward model."""

    def make(out: Path, *settings: str, model: Path = family["policy"], more: Sequence[str] = ()) -> list[str]:
        rewards = f'rewards=[{{name = "reward_model", model = "{family["foreign"]}"}}]'
        common = ["steps=2", "batch_size=4", "engine.precision=float32", "sampling.max_new_tokens=8", "samples=0"]
        common += ["rollout.epochs=1", "optimizer.learning_rate=0.003", "optimizer.warmup=0.0", rewards]
        words = [word for setting in (*common, *settings) for word in ("--set", setting)]
        files = ["--model", str(model), "--data", str(family["prompts"]), "--out", str(out)]
        return ["train", "ppo", *files, *words, *more]

    return make


def first_step(out: Path) -> tuple[dict[str, float], list[tuple[list[int], Completion]], list[float]]:
    """Metrics of the first step; prompt tokens and completions that have a reward; rewards."""
    store = RolloutStore(out)
    kept, found = store.completions(0, range(4)), store.rewards(0, 0)
    store.close()
    assert found is not None
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    tokenizer, pairs, rewards = tiny_tokenizer(), [], []
    for place, reward in enumerate(found[0]):
        completion = kept[place, 0]
        if reward.value is None:
            continue
        rewards.append(reward.value)
        prompt = PROMPTS[int(completion.prompt_id.rpartition(":")[2]) - 1]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        pairs.append((ids, completion))
    return row, pairs, rewards


def mean_value(model: Any, head: Any, pairs: Sequence[tuple[list[int], Completion]]) -> float:
    """Of the state before every token, over all tokens: transformers alone."""
    values = []
    for prompt, completion in pairs:
        tokens = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            states = model.base_model(tokens).last_hidden_state[0]
            values.append(head(states)[len(prompt) - 1 : -1, 0])
    return float(torch.cat(values).mean())


def classifier_value(path: Path, pairs: Sequence[tuple[list[int], Completion]]) -> float:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    return mean_value(model, model.score, pairs)


def test_a_critic_starts_as_the_reward_model_and_goes_on_in_the_next_run(
    ppo: Callable[..., list[str]], family: dict[str, Path], tmp_path: Path
) -> None:
    """The first values that a run measures are those of what it was given, computed by transformers."""
    settings = ["loss.name=ppo_clip", "critic.optimizer.learning_rate=0.01", "critic.optimizer.warmup=0.0"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(ppo(first, *settings, f"critic.model={family['reward']}")) == 0
    row, pairs, _ = first_step(first)
    assert row["val/mean"] == pytest.approx(classifier_value(family["reward"], pairs), abs=1e-4)
    again = [*settings, f"critic.model={first / 'critic'}"]
    assert run(ppo(second, *again, model=first / "model")) == 0
    row, pairs, _ = first_step(second)
    learned = classifier_value(first / "critic", pairs)
    assert row["val/mean"] == pytest.approx(learned, abs=1e-4)
    assert learned != pytest.approx(classifier_value(family["reward"], pairs), abs=1e-2)


@pytest.mark.parametrize("more", [(), ("--lora",)], ids=["all weights", "LoRA"])
def test_a_value_head_goes_on_in_the_next_run(
    more: Sequence[str], ppo: Callable[..., list[str]], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(ppo(first, more=more)) == 0
    assert first_step(first)[0]["val/mean"] == 0
    saved = first / "critic.safetensors"
    assert run(ppo(second, f"critic.value_head={saved}", model=first / "model", more=more)) == 0
    row, pairs, _ = first_step(second)
    head = torch.nn.Linear(32, 1)
    head.load_state_dict(safetensors.torch.load_file(saved))
    model = transformers.AutoModelForCausalLM.from_pretrained(first / "model")  # an adapter: with its base
    expected = mean_value(model, head, pairs)
    assert abs(expected) > 1e-3
    assert row["val/mean"] == pytest.approx(expected, abs=1e-4)
    assert not torch.equal(safetensors.torch.load_file(second / "critic.safetensors")["weight"], head.weight)


def test_a_reward_model_reads_the_text_in_its_own_tokens_and_template(
    ppo: Callable[..., list[str]], family: dict[str, Path], tmp_path: Path
) -> None:
    """What the run has kept as rewards is what transformers says of the conversation, written out by hand."""
    assert run(ppo(tmp_path / "run", "steps=1")) == 0
    _, pairs, rewards = first_step(tmp_path / "run")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(family["foreign"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(family["foreign"])
    for (_, completion), reward in zip(pairs, rewards, strict=True):
        asked = PROMPTS[int(completion.prompt_id.rpartition(":")[2]) - 1][0]["content"]
        text = f"user<end>{asked}<end>assistant<end>{completion.text}<end>"
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            score = model.score(model.model(tokens).last_hidden_state[0, -1])
        assert reward == pytest.approx(float(score), abs=0.03)  # rewards are computed in bfloat16
    assert max(rewards) - min(rewards) > 0.3


def test_what_cannot_be_a_critic_is_refused_before_the_run_begins(
    ppo: Callable[..., list[str]], family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    separate, out = "loss.name=ppo_clip", tmp_path / "run"
    cases = [
        ((separate, f"critic.model={family['foreign']}"), "Its tokens are not those of the policy"),
        ((separate, f"critic.model={tmp_path}"), f"critic.model {tmp_path}: This directory holds no model"),
        ((f"critic.value_head={tmp_path / 'none'}",), "There is no such file"),
    ]
    for settings, message in cases:
        assert run(ppo(out, *settings)) == 1
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
        assert not out.exists()


def test_a_value_head_of_another_size(
    ppo: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "critic.safetensors")
    assert run(ppo(tmp_path / "run", f"critic.value_head={tmp_path / 'critic.safetensors'}")) == 1
    said = capsys.readouterr().err
    assert "This value head cannot be loaded" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["critic.value_clip=0.1"], "name either model or value_head"),
        (["critic.model=x", "critic.value_head=y"], "name either model or value_head"),
        (["critic.value_head=y", "critic.value_clip=0.1"], "have no effect"),
        (["critic.value_head=y", "critic.optimizer.learning_rate=0.1"], "have no effect"),
        (["critic.value_head=y", "loss.name=ppo_clip"], "trains no value head"),
        (["critic.model=y"], "would be idle"),
    ],
)
def test_settings_of_a_critic_without_effect_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_online("ppo", None, settings)
