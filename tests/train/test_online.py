"""Online training: against a naive loop, with groups left out, with critics and references, by every recipe."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from accord.cli import run
from accord.engine.engine import Engine, EngineConfig
from accord.models.load import load_policy
from accord.models.render import Renderer
from accord.models.tiny import save_tiny
from accord.rewards import Rewards
from accord.sampling.local import LocalSampler
from accord.sampling.request import SamplingConfig
from accord.sampling.serve import SampleServer
from accord.train import encode_prompts, is_online
from accord.train.credit import trees_of
from accord.train.online_config import Method
from accord.train.rollouts import EncodedPrompt, Rollout, Rollouts, RolloutStore
from accord.types import Completion, Prompt

RECIPES = [path.name.removesuffix(".toml") for path in resources.files("accord.train").joinpath("recipes").iterdir()]

REWARDS = """
from pathlib import Path

def even(prompts, completions):
    "The share of even tokens; prompts with a full stop give everything the same."
    return [
        0.5 if "." in p.content else sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids)
        for p, c in zip(prompts, completions)
    ]

def broken(prompts, completions):
    raise OSError("no such sensor: 7")

def half(prompts, completions):
    "Nothing of every second completion."
    return [None if k % 2 else float(c.token_ids[0]) / 259 for k, c in enumerate(completions)]

def same(prompts, completions):
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts; a third of them have a full stop."""
    directory = tmp_path_factory.mktemp("prompts")
    (directory / "rewards.py").write_text(REWARDS)
    words = ["red", "green", "blue", "black", "white", "grey"]
    rows = [{"prompt": f"Say {words[i % 6]} {i}{'.' if i % 3 == 0 else ':'}"} for i in range(12)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def command(tiny_llama: Path, prompts: Path) -> Callable[..., list[str]]:
    """`accord train` of two steps in float32 with four prompts each and short completions."""

    def make(name: str, out: Path, *settings: str, reward: str = "even", more: Sequence[str] = ()) -> list[str]:
        common = ["steps=2", "batch_size=4", "engine.precision=float32"]
        common += ["sampling.max_new_tokens=8", "optimizer.learning_rate=0.003", "optimizer.warmup=0.0"]
        words = [word for setting in (*common, *settings) for word in ("--set", setting)]
        rewards = ["--reward", f"{prompts / 'rewards.py'}:{reward}"] if reward else []
        data = ["--data", str(prompts / "prompts.jsonl")]
        return ["train", name, "--model", str(tiny_llama), *data, "--out", str(out), *rewards, *words, *more]

    return make


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, Any]:
    return safetensors.torch.load_file(out / "model" / "model.safetensors")


def sampled(out: Path, step: int, prompts: int, each: int) -> tuple[list[list[Completion]], list[list[float]]]:
    """Completions and reward values of a step, from the file that the run has left."""
    store = RolloutStore(out)
    kept = store.completions(step, range(prompts))
    found = store.rewards(step, 0)
    store.close()
    assert found is not None
    values = [reward.value for reward in found[0]]
    completions = [[kept[place, k] for k in range(each)] for place in range(prompts)]
    return completions, [values[place * each : (place + 1) * each] for place in range(prompts)]  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(filter(is_online, RECIPES)))
def test_every_recipe_trains_by_the_command(
    name: str, command: Callable[..., list[str]], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    if name == "distill":
        teacher = save_tiny(tmp_path / "teacher", seed=1)
        words = command(name, out, f"advantage.teacher={teacher}", reward="")
    else:
        words = command(name, out)
    assert run(words) == 0
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["updates"] >= 1 and np.isfinite(row["loss"]) for row in rows)
    assert all("reward" not in row if name == "distill" else 0 <= row["reward"] <= 1 for row in rows)
    shares = [rows[0][f"time/{part}"] for part in ("sampling", "reward", "forward", "backward")]
    assert min(shares) > 0
    assert sum(shares) <= 1
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(out).items())
    transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    left = {"config.toml", "metrics.jsonl", "model", "provenance.json", "rollouts.sqlite", "samples.html"}
    assert {path.name for path in out.iterdir()} == left | ({"critic.safetensors"} if name == "ppo" else set())
    assert "Step 2 · reward" in (out / "samples.html").read_text()


def test_one_step_of_grpo_is_that_of_a_naive_loop(
    command: Callable[..., list[str]], tiny_llama: Path, prompts: Path, tmp_path: Path
) -> None:
    """No packing, no sharing, a formula of our own: −mean over completions of the mean over tokens of A·ρ, ρ = 1.

    A large epsilon makes Adam's first step a smooth function of the gradient, so that weights can be compared.
    """
    out = tmp_path / "run"
    settings = ["steps=1", "rollout.completions=4", "optimizer.epsilon=0.1", "sampling.temperature=0.8"]
    assert run(command("grpo", out, *settings)) == 0
    completions, values = sampled(out, 0, 4, 4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    texts = {row["id"]: row["prompt"] for row in _rows(prompts)}
    total = torch.zeros(())
    for group, rewards in zip(completions, values, strict=True):
        r = torch.tensor(rewards, dtype=torch.float64)
        advantages = (r - r.mean()) / (r.std() + 1e-4)
        for completion, advantage in zip(group, advantages, strict=True):
            prompt = tokenizer(texts[completion.prompt_id])["input_ids"]
            tokens = torch.tensor([*prompt, *completion.token_ids])
            logits = model(tokens[None, :-1]).logits[0, len(prompt) - 1 :] / 0.8
            logprobs = logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0]
            np.testing.assert_allclose(logprobs.detach(), completion.logprobs, atol=1e-4)
            total = total - ((logprobs - logprobs.detach()).exp() * advantage).mean() / 16
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=0.003, eps=0.1, weight_decay=0.0).step()
    (row,) = metrics(out)
    assert row["loss"] == pytest.approx(total.item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["policy/approxkl_avg"] < 1e-8
    for name, tensor in weights(out).items():
        np.testing.assert_allclose(tensor, model.state_dict()[name], atol=2e-6, err_msg=name)


def _rows(prompts: Path) -> list[dict[str, str]]:
    path = prompts / "prompts.jsonl"
    lines = path.read_text().splitlines()
    return [{"id": f"{path}:{number}", **json.loads(line)} for number, line in enumerate(lines, 1)]


def test_groups_without_an_advantage_cost_nothing_and_change_nothing(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights as with all groups computed, from fewer tokens; averaged over a share that counts them all."""
    skipping, computing = tmp_path / "skipping", tmp_path / "computing"
    for average in ("sequence", "token", "constant"):
        settings = ["steps=3", f"rollout.average={average}", "optimizer.epsilon=0.1"]
        assert run(command("grpo", skipping / average, *settings)) == 0
        with monkeypatch.context() as patch:
            patch.setattr(Method, "may_skip", False)
            assert run(command("grpo", computing / average, *settings)) == 0
        ours, theirs = metrics(skipping / average), metrics(computing / average)
        assert sum(row["tokens"] for row in ours) < 0.9 * sum(row["tokens"] for row in theirs)
        assert any(row["frac_reward_zero_std"] > 0 for row in ours)
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-6)
        expected = weights(computing / average)
        for name, tensor in weights(skipping / average).items():
            np.testing.assert_allclose(tensor, expected[name], atol=1e-5, err_msg=name)


def test_a_step_with_nothing_to_learn_changes_no_weight_and_says_so(
    command: Callable[..., list[str]], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(command("grpo", out, reward="same")) == 0
    assert "Step 2: no completion of a prompt is better than another" in capsys.readouterr().out
    assert [(row["updates"], row["frac_reward_zero_std"], row["tokens"]) for row in metrics(out)] == [(0, 1, 0)] * 2
    before = safetensors.torch.load_file(tiny_llama / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items())


def test_failed_rewards_are_told_and_where_all_fail_the_run_stops(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command("rloo", tmp_path / "half", "rollout.completions=4", reward="half")) == 0
    assert "half failed for 8 of 16 completions: none returned 8" in capsys.readouterr().out
    assert metrics(tmp_path / "half")[1]["rewards/half/failed"] == 0.5
    assert run(command("grpo", tmp_path / "none", reward="broken")) == 1
    message = capsys.readouterr().err
    assert "Every reward failed. broken failed for 32 of 32 completions: OSError 32 (OSError: no such sensor" in message
    assert "Traceback" not in message


def test_where_all_rewards_failed_the_run_goes_on_once_they_are_mended(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Failures of a step that stopped the run are not kept; its completions are."""
    sensor, out = tmp_path / "sensor", tmp_path / "run"
    text = f"def read(prompts, completions):\n    return [float(open({str(sensor)!r}).read())] * len(completions)\n"
    (tmp_path / "mine.py").write_text(text)
    words = [*command("grpo", out, "steps=1", reward=""), "--reward", f"{tmp_path / 'mine.py'}:read"]
    assert run(words) == 1
    store = RolloutStore(out)
    kept = store.completions(0, range(4))
    store.close()
    assert len(kept) == 32
    sensor.write_text("0.5")
    assert run([*words, "--resume"]) == 0
    assert len(metrics(out)) == 1


def test_a_server_samples_what_this_process_would(
    command: Callable[..., list[str]], tiny_llama: Path, tmp_path: Path
) -> None:
    """The same tokens from the weights of every step, so the same policy within rounding."""
    server = SampleServer(str(tiny_llama), precision="float32")
    threading.Thread(target=server.run, daemon=True).start()
    more = ["--sampler", server.url, "--set", f"sampler.exchange={tmp_path / 'exchange'}"]
    settings = ["steps=3", "optimizer.epsilon=0.1"]
    try:
        assert run(command("grpo", tmp_path / "remote", *settings, more=more)) == 0
    finally:
        server.close()
    assert run(command("grpo", tmp_path / "local", *settings)) == 0
    remote, local = metrics(tmp_path / "remote"), metrics(tmp_path / "local")
    assert [row["reward"] for row in remote] == [row["reward"] for row in local]
    assert {row["sampling/version_lag"] for row in remote} == {0}
    expected = weights(tmp_path / "local")
    for name, tensor in weights(tmp_path / "remote").items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-4, err_msg=name)


def test_dynamic_sampling_trains_on_groups_that_differ(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """A third of the prompts gives equal rewards: others take their places, and a later step goes on behind them."""
    out = tmp_path / "run"
    assert run(command("grpo", out, "steps=3", "rollout.dynamic_sampling=4", "rollout.completions=4")) == 0
    rows = metrics(out)
    assert sum(row["dynamic_sampling/prompts"] for row in rows) > 12
    for step, row in enumerate(rows):
        completions, _ = sampled(out, step, 4, 4)
        assert row["frac_reward_zero_std"] == pytest.approx(1 - 4 / row["dynamic_sampling/prompts"])
        assert len({group[0].prompt_id for group in completions}) == 4
    # Twelve prompts: each is taken once before any comes again.
    store = RolloutStore(out)
    first = [store.completions(0, range(99)), store.completions(1, range(99)), store.completions(2, range(99))]
    store.close()
    taken = [kept[place, 0].prompt_id for kept in first for place in range(len(kept) // 4)]
    assert len(set(taken[:12])) == 12


def test_several_epochs_move_the_ratio_and_a_kl_ends_them(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert run(command("grpo", tmp_path / "all", "rollout.epochs=4", "rollout.mini_batches=2")) == 0
    (row, _) = metrics(tmp_path / "all")
    assert row["updates"] == 8 or row["frac_reward_zero_std"] > 0
    assert row["policy/approxkl_avg"] > 1e-6
    stop = ["rollout.epochs=4", "rollout.mini_batches=2", "rollout.kl_stop=1e-9"]
    assert run(command("grpo", tmp_path / "stopped", *stop)) == 0
    assert metrics(tmp_path / "stopped")[0]["updates"] < row["updates"]


@pytest.mark.parametrize("more", [(), ("--lora",)], ids=["frozen copy", "adapters off"])
def test_the_reference_is_the_model_as_it_was(
    more: tuple[str, ...], command: Callable[..., list[str]], tiny_llama: Path, prompts: Path, tmp_path: Path
) -> None:
    """objective/kl of the second step: what sampled, less what the untrained model says of the same tokens."""
    out = tmp_path / "run"
    settings = ["rollout.completions=2", "sampling.temperature=0.7", "optimizer.learning_rate=0.02"]
    assert run(command("rloo", out, *settings, more=more)) == 0
    policy = load_policy(str(tiny_llama))
    policy.temperature = 0.7
    texts = {row["id"]: row["prompt"] for row in _rows(prompts)}
    completions, _ = sampled(out, 1, 4, 2)
    rollouts = []
    for group in completions:
        prompt = Prompt(group[0].prompt_id, texts[group[0].prompt_id])
        rollouts.append(Rollout(EncodedPrompt(prompt, Renderer(policy).prompt(prompt.content)), tuple(group), ()))
    said = Engine(policy, EngineConfig(precision="float32")).forward(trees_of(rollouts))
    kls = [
        sum(completion.logprobs) - values.sum()
        for group, of_tree in zip(completions, said, strict=True)
        for completion, values in zip(group, of_tree, strict=True)
    ]
    first, second = metrics(out)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(second["objective/kl"]) > 1e-2
    assert second["objective/kl"] == pytest.approx(np.mean(kls), abs=1e-4)


def test_a_separate_critic_learns_and_is_kept(
    command: Callable[..., list[str]], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = ["loss.name=ppo_clip", f"critic.model={tiny_llama}", "critic.optimizer.learning_rate=0.01", "steps=6"]
    assert run(command("ppo", out, *settings, "critic.optimizer.warmup=0.0", "checkpoint_every=2")) == 0
    rows = metrics(out)
    assert rows[0]["val/error"] > 2 * rows[-1]["val/error"]
    assert {"loss/value_avg", "critic/grad_norm", "critic/learning_rate"} <= rows[0].keys()
    assert (out / "critic" / "config.json").exists()
    assert not (out / "critic.safetensors").exists()


def test_what_belongs_to_other_recipes_is_refused(
    command: Callable[..., list[str]],
    data: dict[str, Path],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    offline = ["train", "sft", "--model", str(tiny_llama), "--data", str(data["sft"]), "--out", str(out)]
    cases = [
        (command("grpo", out, more=["--deepspeed", "x.json"]), "Give the path of a DeepSpeed configuration"),
        (command("grpo", out, reward=""), "No reward is named"),
        (command("grpo", out, 'rewards=[{name = "length", max = 3}]'), "name rewards already"),
        (command("grpo", out, "sampling.max_new_tokens=500"), "more than the limit of 512"),
        (command("grpo", out, reward="", more=["--reward", "exact_answer"]), "have no answer"),
        (command("grpo", out, more=["--sampler", "ftp://x"]), "sampler.url"),
        ([*offline, "--reward", "length"], "learns from data"),
        ([*offline, "--sampler", "http://127.0.0.1:1"], "learns from data"),
        (["plan", "grpo", *offline[2:6]], "No reward is named"),
    ]
    for words, message in cases:
        assert run(words) == 1, words
        said = capsys.readouterr().err
        assert message in said, said
        assert "Traceback" not in said
    assert not out.exists()


class BrokenOffError(Exception):
    """Stands for a process that ends while it samples."""


class Counting:
    """A sampler behind which there is another machine; it can break down after some completions."""

    policy_version, weights_hash = 0, ""

    def __init__(self, sampler: LocalSampler, survives: int = 1 << 30) -> None:
        self.sampler, self.survives, self.asked = sampler, survives, 0

    def load(self, version: int, policy: Any, state: Any = None) -> None:
        self.sampler.load(version, policy, state)

    def sample(self, requests: Any, config: Any, *, on_finish: Any = None) -> list[Completion]:
        self.asked += len(requests)

        def finish(index: int, completion: Completion) -> None:
            on_finish(index, completion)
            self.survives -= 1
            if self.survives == 0:
                raise BrokenOffError

        return self.sampler.sample(requests, config, on_finish=finish)


def test_a_round_that_was_interrupted_is_finished_with_what_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    """A remote sampler is asked for what is missing; the local one samples the round again, to the same bits."""
    policy = load_policy(str(tiny_llama))
    records = [Prompt(f"p{i}", f"Say {i}:") for i in range(5)]
    encoded = encode_prompts(Renderer(policy), records, 8)
    rewards = Rewards([{"name": "length", "max": 3, "normalise": "running"}])

    def rollouts(directory: Path, sampler: Any) -> Rollouts:
        directory.mkdir(exist_ok=True)
        config = SamplingConfig(max_new_tokens=8)
        return Rollouts(encoded, sampler, rewards, RolloutStore(directory), config, completions=3, seed=1)

    local = LocalSampler(policy, "float32")
    straight = [each.completions for each in rollouts(tmp_path / "straight", local).collect(4)]
    counting = Counting(local, survives=5)
    with pytest.raises(BrokenOffError):
        rollouts(tmp_path / "broken", counting).collect(4)
    again = Counting(local)
    resumed = [each.completions for each in rollouts(tmp_path / "broken", again).collect(4)]
    assert again.asked == 12 - 5
    assert [[c.token_ids for c in group] for group in resumed] == [[c.token_ids for c in group] for group in straight]
    with pytest.raises(BrokenOffError):
        rollouts(tmp_path / "local", Counting(local, survives=5)).collect(4)
    assert [each.completions for each in rollouts(tmp_path / "local", local).collect(4)] == straight
    third = Counting(local)
    kept = rollouts(tmp_path / "local", third)
    assert [each.completions for each in kept.collect(4)] == straight
    assert third.asked == 0


def test_a_kept_round_is_not_scored_again(tiny_llama: Path, tmp_path: Path) -> None:
    """Its rewards come from the file, and so does the running mean behind them."""
    policy = load_policy(str(tiny_llama))
    encoded = encode_prompts(Renderer(policy), [Prompt(f"p{i}", f"Say {i}:") for i in range(3)], 8)
    settings = [{"name": "length", "unit": "tokens", "max": 3, "normalise": "running"}]
    first, second = Rewards(settings), Rewards(settings)
    found = []
    for rewards in (first, second):
        config, sampler = SamplingConfig(max_new_tokens=8), LocalSampler(policy, "float32")
        made = Rollouts(encoded, sampler, rewards, RolloutStore(tmp_path), config, completions=3, seed=1)
        found.append([each.rewards for each in made.collect(3)])
    assert found[0] == found[1]
    assert first.state() == second.state() != Rewards(settings).state()
