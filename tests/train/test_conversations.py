"""Conversations with environments: their tokens, masks, log-probabilities and losses against naive ones; failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import trl

from accord.advantages import ADVANTAGES
from accord.cli import run
from accord.engine.engine import Engine, EngineConfig
from accord.environments import End, EnvironmentConfig, Environments, Observation, Turn
from accord.errors import ConfigError
from accord.models.load import load_policy
from accord.models.network import Policy
from accord.models.render import Renderer
from accord.models.tiny import tiny_tokenizer
from accord.models.trees import with_reference
from accord.rewards import Rewards
from accord.sampling.local import LocalSampler
from accord.sampling.request import Request, SamplingConfig
from accord.tracking import read_metrics
from accord.train.conversations import Conversations
from accord.train.credit import groups_of, policy_trees, rollout_metrics, trees_of, weighted_updates
from accord.train.online_config import RolloutConfig
from accord.train.rollouts import EncodedPrompt, Rollout, RolloutStore
from accord.types import Completion, Message, Prompt

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
STOP, LETTERS = 2, [int(token) for token in tiny_tokenizer().encode("abcdef", add_special_tokens=False)]
PLAIN = {token: -100.0 for token in range(259) if token not in (STOP, *LETTERS)}
"""Letters and the stop token alone, so that texts say what tokens were."""

GAME = """
import os, signal, threading
from pathlib import Path

from accord.environments import End, Observation
from accord.types import Message


class Game:
    "Answers twice; in the end even or odd characters count, as the row says. The row may break it."

    def __init__(self, prompt, seed, turns=3):
        self.letter, self.breaks, self.turns = prompt.fields["letter"], prompt.fields.get("breaks"), turns
        self.said = ""

    def reply(self, turn):
        self.said += turn.text
        if self.breaks == "raise" and turn.number == 2:
            raise RuntimeError("no such square: 7")
        if self.breaks == "hang":
            threading.Event().wait(5)
        if turn.number < self.turns:
            return Observation((Message("user", f"Turn {turn.number}."),), parts={"cut": turn.stop_reason == "length"})
        hits = sum((ord(character) + ord(self.letter)) % 2 for character in self.said)
        return End(hits / max(1, len(self.said)), {"said": len(self.said)})


class Killer(Game):
    "Its call number n ends the process with SIGKILL if the file `kills` names n; calls count on."

    def reply(self, turn):
        here = Path(__file__).parent
        with lock:
            calls = here / "calls"
            number = len(calls.read_text()) + 1 if calls.exists() else 1
            calls.write_text("." * number)
        if (here / "kills").exists() and str(number) in (here / "kills").read_text().split():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reply(turn)

lock = threading.Lock()
"""


@pytest.fixture(scope="module")
def policy(tiny_llama: Path) -> Policy:
    return load_policy(str(tiny_llama))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts, and a file of environments."""
    directory = tmp_path_factory.mktemp("game")
    (directory / "game.py").write_text(GAME)
    rows = [{"prompt": [{"role": "user", "content": f"Say {k}:"}], "letter": "abcdef"[k % 6]} for k in range(8)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def command(tiny_llama: Path, place: Path) -> Callable[..., list[str]]:
    """`accord train` with an environment: one step of four prompts, letters alone."""

    def make(recipe: str, out: Path, *settings: str, data: Path | None = None, name: str = "Game") -> list[str]:
        words = ["train", recipe, "--model", str(tiny_llama), "--data", str(data or place / "prompts.jsonl")]
        words += ["--out", str(out), "--environment", f"{place / 'game.py'}:{name}"]
        common = ["steps=1", "batch_size=4", "engine.precision=float32", "environment.max_turn_tokens=6"]
        common += ["sampling.max_new_tokens=120", "optimizer.learning_rate=0.003", "optimizer.warmup=0.0"]
        return words + [word for setting in (*common, *settings) for word in ("--set", setting)]

    return make


class Script:
    """Answers with these messages, one after the other, then ends."""

    def __init__(self, *answers: Sequence[Message] | Exception, reward: float | None = 1.0) -> None:
        self.answers, self.reward, self.seen = list(answers), reward, []

    def reply(self, turn: Turn) -> Observation | End:
        self.seen.append(turn)
        if len(self.seen) > len(self.answers):
            return End(self.reward, {"ends": 1})
        answer = self.answers[len(self.seen) - 1]
        if isinstance(answer, Exception):
            raise answer
        return Observation(tuple(answer), parts={"answers": 1})


def user(text: str) -> list[Message]:
    return [Message("user", text)]


def talk(
    policy: Policy,
    scripts: Sequence[Any],
    sampling: SamplingConfig,
    prompts: Sequence[Prompt] | None = None,
    **config: Any,
) -> list[Completion]:
    """A conversation with each script."""
    prompts = prompts or [Prompt(f"p{k}", (Message("user", f"Hi {k}."),)) for k in range(len(scripts))]
    made = dict(zip([prompt.id for prompt in prompts], scripts, strict=True))
    environments = Environments(EnvironmentConfig(name="script", **config), lambda prompt, _: made[prompt.id])
    renderer = Renderer(policy)
    requests = [
        Request(prompt.id, tuple(renderer.prompt(prompt.content).tolist()), seed) for seed, prompt in enumerate(prompts)
    ]
    table = Conversations(environments, renderer, sampling, rewarded=True).table(prompts, requests)
    LocalSampler(policy, "float32").sample(table.requests, sampling, follow=table.follow)
    return [table.completion(index) for index in range(len(prompts))]


def test_the_row_of_a_conversation_is_what_was_sampled_and_what_the_template_puts_between(policy: Policy) -> None:
    """Token by token: decoded, the row is the rendered conversation; the mask is true exactly in the policy's turns."""
    scripts = [Script(user("One."), [*user("Two,"), Message("system", "and more.")]) for _ in range(12)]
    sampling = SamplingConfig(max_new_tokens=300, logit_bias=PLAIN)
    completions = talk(policy, scripts, sampling, max_turn_tokens=7)
    renderer, tokenizer = Renderer(policy), policy.tokenizer
    ended = set()
    for k, (script, completion) in enumerate(zip(scripts, completions, strict=True)):
        episode = completion.episode
        assert episode is not None
        assert [turn.number for turn in script.seen] == [1, 2, 3]
        assert episode.turns == 3
        assert (episode.reward, episode.parts) == (1.0, {"answers": 2, "ends": 1})
        prompt = (Message("user", f"Hi {k}."),)
        # The naive row: what was said, token by token, and the template's text between the turns.
        said = [renderer.tokenizer.encode(turn.text, add_special_tokens=False) for turn in script.seen]
        row, mask = [], []
        for turn, tokens, answer in zip(script.seen, said, [*script.answers, None], strict=True):
            stopped = turn.stop_reason == "stop"
            ended.add(stopped)
            row += tokens + [STOP] * stopped
            mask += [True] * (len(tokens) + stopped)
            if answer is not None:
                closing = ("" if stopped else "<|im_end|>") + "\n"
                opened = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in answer)
                between = tokenizer.encode(f"{closing}{opened}<|im_start|>assistant\n", add_special_tokens=False)
                row += between
                mask += [False] * len(between)
        assert completion.token_ids == tuple(row)
        assert completion.sampled == tuple(mask)
        assert completion.length == sum(mask)
        assert completion.text == script.seen[-1].text
        whole = tokenizer.decode([*renderer.prompt(prompt).tolist(), *row])
        expected = renderer._chat([*prompt, *episode.messages], generation=False, source=None)
        assert expected.startswith(whole.removesuffix("<|im_end|>"))
        assert np.all(np.array(completion.logprobs)[~np.array(mask)] == 0)
    assert ended == {True, False}


def test_the_samplers_logprobs_are_those_of_training_and_nothing_is_said_of_observations(policy: Policy) -> None:
    scripts = [Script(user("One."), user("Two.")) for _ in range(4)]
    completions = talk(policy, scripts, SamplingConfig(max_new_tokens=120), max_turn_tokens=9)
    trees = trees_of([rollout([completion]) for completion in completions])
    for tree, completion, (said_L,) in zip(
        trees, completions, Engine(policy, EngineConfig(precision="float32")).forward(trees), strict=True
    ):
        np.testing.assert_allclose(said_L, completion.logprobs, atol=2e-5)
        assert tree.branches[0].loss_mask_L.tolist() == list(completion.sampled)
        assert 0 < sum(completion.sampled) < len(completion.sampled)


def rollout(completions: Sequence[Completion]) -> Rollout:
    prompt = Prompt(completions[0].prompt_id, (Message("user", f"Hi {completions[0].prompt_id[1:]}."),))
    ids = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": prompt.content[0].content}],
        add_generation_prompt=True,
        return_dict=False,  # type: ignore[union-attr]
    )
    rewards = Rewards([{"name": "environment"}])([prompt] * len(completions), completions)
    return Rollout(EncodedPrompt(prompt, np.array(ids)), tuple(completions), tuple(rewards))


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_credit_is_that_of_the_sampled_tokens_alone(policy: Policy, name: str) -> None:
    """With observations taken out, the same advantages, returns, weights and denominators in the same places."""
    scripts = [Script(*[user("One.")] * (k % 3), reward=float(k)) for k in range(4)]
    prompts = [Prompt(f"p{k}", (Message("user", "Hi 0."),)) for k in range(4)]
    completions = talk(policy, scripts, SamplingConfig(max_new_tokens=70), prompts, max_turn_tokens=9)
    completions = [replace(completion, prompt_id="p0") for completion in completions]
    rng, seen = np.random.default_rng(0), []
    reference = [rng.normal(size=len(completion.token_ids)).astype(np.float32) for completion in completions]
    values = [rng.normal(size=len(completion.token_ids)).astype(np.float32) for completion in completions]
    for bare in (False, True):
        kept = [np.array(c.sampled) if bare else np.ones(len(c.token_ids), bool) for c in completions]
        shown = [shortened(c) if bare else c for c in completions]
        trees = trees_of([replace(rollout(completions), completions=tuple(shown))])
        trees = [with_reference(trees[0], [r[k] for r, k in zip(reference, kept, strict=True)])]
        own_values = [[v[k] for v, k in zip(values, kept, strict=True)]]
        groups = groups_of(trees, [np.array([0.0, 1.0, 2.0, 3.0])], own_values)
        assert groups[0].lengths == tuple(completion.length for completion in completions)
        config = RolloutConfig(average="token")
        bound = ADVANTAGES[name].bind({})
        made, idle = policy_trees(trees, groups, bound, config, 70)
        (update,) = weighted_updates(made, idle, config, 70, (0,))
        seen.append((made[0].branches, update.denominator))
    (whole, denominator), (short, expected) = seen
    assert denominator == expected
    for branch, bare_branch in zip(whole, short, strict=True):
        mask_L = branch.loss_mask_L
        for column in ("advantage_L", "weight_L", "return_L", "value_L"):
            found, alone = getattr(branch, column), getattr(bare_branch, column)
            assert (found is None) == (alone is None)
            if found is not None:
                np.testing.assert_array_equal(found[mask_L], alone)
                assert not found[~mask_L].any()


def shortened(completion: Completion) -> Completion:
    """Without what was observed."""
    kept = [place for place, sampled in enumerate(completion.sampled) if sampled]
    columns = {
        name: tuple(getattr(completion, name)[k] for k in kept) for name in ("token_ids", "logprobs", "raw_logprobs")
    }
    return replace(completion, **columns, episode=None)


def test_one_step_of_grpo_is_that_of_a_naive_loop(
    command: Callable[..., list[str]], tiny_llama: Path, tmp_path: Path
) -> None:
    """−mean over conversations of the mean over sampled tokens of A·ρ, from whole rows without packing."""
    out = tmp_path / "run"
    assert run(command("grpo", out, "rollout.completions=4", "optimizer.epsilon=0.1")) == 0
    store = RolloutStore(out)
    kept, found = store.completions(0, range(4)), store.rewards(0, 0)
    store.close()
    assert found is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    total = torch.zeros(())
    for place in range(4):
        r = torch.tensor([found[0][4 * place + k].value for k in range(4)], dtype=torch.float64)
        for k, advantage in enumerate((r - r.mean()) / (r.std() + 1e-4)):
            completion = kept[place, k]
            number = int(completion.prompt_id.rpartition(":")[2]) - 1
            asked = [{"role": "user", "content": f"Say {number}:"}]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            tokens = torch.tensor([*prompt, *completion.token_ids])
            logits = model(tokens[None, :-1]).logits[0, len(prompt) - 1 :]
            logprobs = logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0]
            logprobs = logprobs[torch.tensor(completion.sampled)]
            total = total - ((logprobs - logprobs.detach()).exp() * advantage).mean() / 16
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=0.003, eps=0.1, weight_decay=0.0).step()
    (row,) = read_metrics(out)
    assert row["loss"] == pytest.approx(total.item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, tensor in safetensors.torch.load_file(out / "model" / "model.safetensors").items():
        np.testing.assert_allclose(tensor, model.state_dict()[name], atol=2e-6, err_msg=name)
    assert row["environment/turns"] == 3
    assert row["completions/max_length"] <= 18 < row["environment/observed_tokens"]
    assert row["reward"] == pytest.approx(row["rewards/environment/mean"])
    assert "[user] Turn 1." in (out / "samples.html").read_text()


@pytest.mark.parametrize("recipe", ["ppo", "rloo", "online_dpo", "rejection_sampling", "reinforce_plus_plus"])
def test_other_recipes_take_conversations(recipe: str, command: Callable[..., list[str]], tmp_path: Path) -> None:
    more = ["rollout.completions=3"] if recipe in ("rloo", "online_dpo", "rejection_sampling") else []
    assert run(command(recipe, tmp_path / "run", *more)) == 0
    (row,) = read_metrics(tmp_path / "run")
    assert row["environment/turns"] == 3
    assert np.isfinite(row["loss"])


def test_limits_end_a_conversation(policy: Policy) -> None:
    """Of turns, and of tokens in all: the row then ends with a turn, and has no more tokens than it may."""
    sampling = SamplingConfig(max_new_tokens=100, logit_bias={STOP: -100.0})
    endless = [Script(*[user("Go on.")] * 50) for _ in range(3)]
    for completion, script in zip(
        talk(policy, endless, sampling, max_turns=2, max_turn_tokens=5), endless, strict=True
    ):
        assert completion.episode is not None
        assert (completion.stop_reason, completion.episode.turns, completion.length) == ("length", 2, 10)
        assert completion.episode.reward == 0.0  # what it gave so far
        assert [turn.last for turn in script.seen] == [False, True]
    endless = [Script(*[user("Go on.")] * 50) for _ in range(3)]
    for completion in talk(policy, endless, sampling, max_turns=99, max_turn_tokens=5):
        assert completion.stop_reason == "length"
        assert completion.sampled[-1]
        assert 60 < len(completion.token_ids) <= 100
    with pytest.raises(ConfigError, match="more tokens than the whole"):
        talk(policy, endless, sampling, max_turn_tokens=101)


def test_an_environment_that_fails_is_data(
    command: Callable[..., list[str]], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()[:4]]
    rows[1]["breaks"], rows[2]["breaks"] = "raise", "hang"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    assert run(command("grpo", out, "rollout.completions=2", "environment.timeout=0.3", data=data)) == 0
    said = capsys.readouterr().out
    assert "environment failed for 4 of 8 completions: environment 4 (environment: " in said
    (row,) = read_metrics(out)
    assert row["environment/failed"] == row["rewards/environment/failed/environment"] == 0.5
    store = RolloutStore(out)
    kept = store.completions(0, range(4))
    store.close()
    turns = {
        each.prompt_id.rpartition(":")[2]: (each.episode.turns, each.episode.failure, each.episode.reward is None)
        for each in kept.values()
        if each.episode
    }
    assert turns["2"] == (2, "RuntimeError: no such square: 7", True)
    assert turns["3"] == (1, "timeout", True)
    assert turns["1"][:2] == turns["4"][:2] == (3, "")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("text", "TypeError: reply returned str"),
        (Observation(("text",)), "TypeError: an observation is a tuple of Message"),  # type: ignore[arg-type]
        (End(float("nan")), "ValueError: a reward or part is not finite"),
        (End("much"), "ValueError: could not convert"),  # type: ignore[arg-type]
        (None, "TypeError: reply returned NoneType"),
    ],
)
def test_answers_that_are_none_are_failures(policy: Policy, answer: Any, reason: str) -> None:
    class Wrong:
        def reply(self, _turn: Turn) -> Any:
            return answer

    (completion,) = talk(policy, [Wrong()], SamplingConfig(max_new_tokens=8))
    assert completion.episode is not None
    assert completion.episode.failure.startswith(reason)
    assert completion.episode.reward is None
    metrics = rollout_metrics([rollout([completion])], 0)
    assert metrics["environment/failed"] == 1


def test_a_reward_that_nobody_reads_stops_the_run(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command("grpo", tmp_path / "run", 'rewards=[{name = "length", max = 5}]')) == 1
    message = capsys.readouterr().err
    assert "gives rewards, which this run does not read" in message
    assert "--reward environment" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        ("qwen3", [], "writes earlier turns differently once others follow"),
        ("gemma", ["environment.name=tools", 'environment.tools=["calculator"]'], "call"),
        ("llama3", ["environment.name=tools", 'environment.tools=["calculator"]'], "call"),
    ],
)
def test_a_template_that_cannot_go_on_is_an_error_before_anything_is_sampled(
    template: str, settings: list[str], message: str, command: Callable[..., list[str]], tmp_path: Path, capsys: Any
) -> None:
    words = command("grpo", tmp_path / "run", f"chat_template={TEMPLATES / template}.jinja", *settings)
    if settings:
        at = words.index("--environment")
        words = [*words[:at], *words[at + 2 :], "--reward", "length"]
    assert run(words) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "chat_template=" in said
    assert not (tmp_path / "run").exists()


PARITY = """
from accord.environments import End, Observation
from accord.types import Message


class Parity:
    "An odd character first, an even one in the second turn."

    def __init__(self, prompt, seed):
        self.right = 0

    def reply(self, turn):
        self.right += ord(turn.text[:1] or " ") % 2 == turn.number % 2
        return Observation((Message("user", "Now even."),)) if turn.number == 1 else End(self.right / 2)
"""


def test_a_tiny_model_learns_two_turns(tiny_llama: Path, tmp_path: Path) -> None:
    """Chance is 0.5; who says the same in both turns has 0.5, who learns one of them 0.75."""
    (tmp_path / "parity.py").write_text(PARITY)
    rows = [{"id": f"p{k}", "prompt": [{"role": "user", "content": "First odd."}]} for k in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "grpo", "--model", str(tiny_llama), "--data", str(tmp_path / "prompts.jsonl")]
    words += ["--environment", f"{tmp_path / 'parity.py'}:Parity", "--out", str(tmp_path / "run")]
    settings = ["steps=18", "batch_size=4", "samples=0", "rollout.completions=8", "sampling.max_new_tokens=60"]
    settings += ["environment.max_turn_tokens=1", "engine.precision=float32"]
    settings += ["optimizer.learning_rate=0.01", "optimizer.warmup=0.0"]
    assert run([*words, *(word for setting in settings for word in ("--set", setting))]) == 0
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run")]
    assert np.mean(rewards[:3]) < 0.62
    assert np.mean(rewards[-3:]) > 0.85


CLOCK = ("seconds", "time/", "sampling/tokens_per_second")


def test_a_killed_run_goes_on_to_the_same_bits(
    command: Callable[..., list[str]], place: Path, commands: Any, tmp_path: Path
) -> None:
    """Killed while an environment answers, in the third step, behind the checkpoint of the second."""
    left = []
    for kills in ("", "30"):
        (place / "kills").write_text(kills)
        (place / "calls").unlink(missing_ok=True)
        out = tmp_path / f"run{bool(kills)}"
        settings = [
            "steps=3",
            "batch_size=2",
            "checkpoint_every=2",
            "rollout.completions=2",
            "optimizer.learning_rate=0.01",
        ]
        words = command("grpo", out, *settings, name="Killer")
        for number in range(len(kills.split())):
            killed = commands.run([*words, *(["--resume"] if number else [])])
            assert killed.code == -9, killed.output
        finished = commands.run([*words, *(["--resume"] if kills else [])])
        assert finished.code == 0, finished.output
        rows = [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in read_metrics(out)]
        left.append((rows, safetensors.torch.load_file(out / "model" / "model.safetensors")))
    (rows, tensors), (again, after) = left
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows == again
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)
