"""A reward model as a reward: its own tokenizer and template, or the sampler's tokens; shared prompts; refusals."""

from __future__ import annotations

import pytest
import torch
import transformers

from accord.engine.engine import Engine, EngineConfig
from accord.errors import ModelError
from accord.models.load import load_reward_model
from accord.models.render import Renderer, sampled_tree
from accord.models.tiny import save_tiny, tiny_model, tiny_tokenizer
from accord.rewards import REWARDS, Failed, Rewards
from accord.types import Completion, Demonstration, Message, Prompt

torch.set_num_threads(1)

PROMPTS = [
    Prompt("a", (Message("user", "Name a colour."),)),
    Prompt("b", (Message("user", "And another one, please?"),)),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "model"
    config = tiny_model().config
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def sampled(tokenizer, prompt: Prompt, text: str, *, stop: bool = True) -> Completion:
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *([tokenizer.eos_token_id] if stop else [])]
    zeros = (0.0,) * len(ids)
    reason = "stop" if stop else "length"
    return Completion(prompt.id, text, tuple(ids), zeros, zeros, reason, temperature=1.0, seed=0)


@pytest.fixture(scope="module")
def batch():
    """Prompts and completions in mixed order; one completion was cut, one is empty."""
    tokenizer = tiny_tokenizer()
    rows = [(0, "Blue"), (1, "Green, I think"), (0, "Red"), (1, "  "), (0, "Bl")]
    prompts = [PROMPTS[k] for k, _ in rows]
    return prompts, [sampled(tokenizer, PROMPTS[k], text, stop=text != "Bl") for k, text in rows]


def build(directory, tokenizer, **settings):
    kind = REWARDS["reward_model"]
    return kind.build(kind.config.build({"name": "reward_model", "model": directory, **settings}), tokenizer)


def one_by_one(directory, trees):
    """Each tree by itself, through the engine."""
    engine = Engine(load_reward_model(directory), EngineConfig())
    return [float(engine.forward([tree])[0][0][0]) for tree in trees]


def test_text_is_rendered_anew_for_another_tokenizer(directory, batch):
    prompts, completions = batch
    renderer = Renderer(load_reward_model(directory))
    kept = [0, 1, 2, 4]
    expected = one_by_one(
        directory,
        [renderer.tree(Demonstration(prompts[k].content, (Message("assistant", completions[k].text),))) for k in kept],
    )
    found = build(directory, None)(prompts, completions)
    assert [found[k] for k in kept] == pytest.approx(expected, abs=1e-5)
    assert found[3] == Failed("the completion is empty")


def test_the_sampler_s_tokens_are_scored_where_the_tokenizer_is_the_policy_s(directory, batch):
    """The completion that was cut has no stop token, which its text rendered anew would have."""
    prompts, completions = batch
    renderer = Renderer(load_reward_model(directory))
    trees = [sampled_tree(renderer.prompt(p.content), [c], (0,)) for p, c in zip(prompts, completions, strict=True)]
    found = build(directory, tiny_tokenizer())(prompts, completions)
    kept = [0, 1, 2, 4]
    assert [found[k] for k in kept] == pytest.approx([one_by_one(directory, trees)[k] for k in kept], abs=1e-5)
    anew = build(directory, None)(prompts, completions)
    assert found[4] != pytest.approx(anew[4], abs=1e-3)
    assert found[0] == pytest.approx(anew[0], abs=1e-5)


def test_another_template_means_that_the_text_is_rendered_anew(directory, batch):
    other = tiny_tokenizer(chat_template="{{ messages }}")
    assert build(directory, other)(*batch)[4] == pytest.approx(build(directory, None)(*batch)[4], abs=1e-5)


def test_its_own_template_changes_the_score(directory, batch, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
                    "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    own = build(directory, tiny_tokenizer(), chat_template=str(path))(*batch)
    assert isinstance(own[0], float)
    assert own[0] != pytest.approx(build(directory, None)(*batch)[0], abs=1e-4)


def test_a_plain_prompt_is_read_plainly(directory):
    prompt = Prompt("a", "2 + 2 =")
    renderer = Renderer(load_reward_model(directory))
    (expected,) = one_by_one(directory, [renderer.tree(Demonstration("2 + 2 =", " 4"))])
    found = build(directory, None)([prompt], [sampled(tiny_tokenizer(), prompt, " 4")])
    assert found == [pytest.approx(expected, abs=1e-5)]


def test_a_prompt_that_is_too_long_fails_alone(directory, batch):
    found = build(directory, None, max_tokens=40)(*batch)
    assert isinstance(found[0], float)
    assert found[1].reason.startswith("cannot be read: The prompt has")


def test_nothing_to_score(directory):
    prompt = PROMPTS[0]
    empty = sampled(tiny_tokenizer(), prompt, "", stop=True)
    assert build(directory, None)([prompt], [empty]) == [Failed("the completion is empty")]


def test_in_a_mixture(directory, batch):
    rewards = Rewards([{"name": "reward_model", "model": directory}, {"name": "length", "max": 9}], tiny_tokenizer())
    found = rewards(*batch)
    assert [each.value is None for each in found] == [False, False, False, True, False]
    assert found[0].value == pytest.approx(found[0].parts["reward_model"] + 1)


def test_a_language_model_is_refused(tmp_path):
    """Its score head would be new, and every score 0."""
    with pytest.raises(ModelError, match="no trained score head"):
        build(str(save_tiny(tmp_path / "model")), None)
