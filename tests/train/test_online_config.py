"""Settings of online recipes: what each amounts to, and what is refused with a message that says why."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from accord.errors import ConfigError
from accord.train import OnlineConfig, is_online, method_of, recipe, resolve, resolve_online

RECIPES = [path.name.removesuffix(".toml") for path in resources.files("accord.train").joinpath("recipes").iterdir()]
ONLINE = sorted(name for name in RECIPES if is_online(name))


@pytest.mark.parametrize("name", ONLINE)
def test_recipes_parse_and_set_nothing_twice(name: str) -> None:
    config = resolve_online(name)
    assert OnlineConfig.build(recipe(name)) == config
    method = method_of(config)
    assert (method.advantage is None) == (config.advantage is None)


def test_the_recipes_are_those_of_the_field() -> None:
    expected = (
        "cispo dapo distill dr_grpo gspo grpo online_dpo ppo reinforce reinforce_plus_plus rejection_sampling rloo"
    )
    assert expected.split() == sorted(ONLINE, key=lambda name: expected.split().index(name))


@pytest.mark.parametrize(
    ("name", "reference", "values", "skips"),
    [
        ("grpo", False, False, True),
        ("dapo", False, False, True),
        ("rloo", True, False, True),
        ("ppo", True, True, False),
        ("online_dpo", True, False, False),
        ("rejection_sampling", False, False, False),
    ],
)
def test_what_a_recipe_needs(name: str, reference: bool, values: bool, skips: bool) -> None:
    """No reference without a KL, no critic without GAE; groups are skipped only where that is exact."""
    method = method_of(resolve_online(name))
    assert method.reads_reference == reference
    assert method.has_value_head == values
    if name not in ("online_dpo", "rejection_sampling"):
        assert method.may_skip == skips


def test_a_kl_in_the_loss_brings_the_reference_and_ends_skipping() -> None:
    method = method_of(resolve_online("grpo", None, ["loss.kl_coefficient=0.04"]))
    assert method.reads_reference
    assert not method.may_skip
    assert not method_of(resolve_online("grpo", None, ["loss.entropy_coefficient=0.01"])).may_skip
    assert not method_of(resolve_online("rloo", None, ["advantage.kl_coefficient=0.0"])).reads_reference


@pytest.mark.parametrize(
    ("name", "assignments", "where", "message"),
    [
        ("grpo", ["sampling.top_p=0.9"], "sampling.top_p", "another distribution"),
        ("grpo", ["sampling.top_k=20"], "sampling.top_k", "another distribution"),
        ("grpo", ["sampling.min_p=0.1"], "sampling.min_p", "another distribution"),
        ("ppo", ["sampling.logit_bias={5 = -100.0}"], "sampling.logit_bias", "another distribution"),
        ("online_dpo", ["sampling.temperature=0.0"], "sampling.temperature", "are the same"),
        ("grpo", ["rollout.completions=1"], "rollout.completions", "compared"),
        ("online_dpo", ["rollout.completions=1"], "rollout.completions", "best"),
        ("rejection_sampling", ["rollout.completions=1"], "rollout.completions", "best"),
        ("reinforce", ["rollout.dynamic_sampling=2"], "rollout.completions", "compared"),
        ("ppo", ["rollout.eos_penalty=1.0"], "rollout.eos_penalty", "missing_eos_penalty"),
        ("grpo", ["rollout.min_reward=1.0"], "rollout.min_reward", "good or bad"),
        ("online_dpo", ["rollout.min_reward=1.0"], "rollout.min_reward", "pair"),
        ("grpo", ["rollout.kl_stop=0.1"], "rollout.kl_stop", "one update"),
        ("online_dpo", ["rollout.kl_stop=0.1", "rollout.epochs=2"], "rollout.kl_stop", "measures no KL"),
        ("grpo", ["rollout.mini_batches=9"], "rollout.mini_batches", "cannot be divided"),
        ("reinforce", ["rollout.epochs=2"], "[rollout]", "one update"),
        ("online_dpo", ["rollout.average=token"], "rollout.average", "average of its own"),
        ("online_dpo", ["advantage.name=rloo"], "[advantage]", "reads no advantage"),
        ("rejection_sampling", ["critic.model=x"], "[critic]", "reads no advantage"),
        ("grpo", ["advantage.name=gae"], "[advantage]|advantage.name", "critic's values"),
        ("grpo", ["critic.model=x"], "[critic]", "reads no values"),
        ("ppo", ["critic.model=x"], "[critic]", "idle"),
        ("ppo", ["advantage.name=rloo", "rollout.completions=2"], "loss.name", "reads no values"),
        ("grpo", ["loss.name=kto"], "loss.name", "does not learn from what a policy samples"),
        ("grpo", ["loss.name=bradley_terry"], "loss.name", "does not learn from what a policy samples"),
        ("grpo", ["loss.name=value"], "loss.name", "does not learn from what a policy samples"),
        ("rejection_sampling", ["loss.name=ppo_clip"], "[advantage]", "none is named"),
        ("distill", ["rewards=[{name = 'length', max = 3}]"], "rewards", "reads no score"),
        ("distill", ["rollout.eos_penalty=1.0"], "rollout.eos_penalty", "reads no score"),
        ("distill", ["rollout.overlong_buffer=0.5"], "rollout.overlong_buffer", "reads no score"),
        ("distill", ["loss.kl_coefficient=0.1"], "loss.kl_coefficient", "the teacher"),
        ("grpo", ["advantage.teacher=x"], "[advantage]", "teacher"),
        ("grpo", ["advantage.name=grouprelative"], "", "Did you mean 'group_relative'"),
        ("grpo", ["advantage.scal=none"], "[advantage]", "Did you mean 'scale'"),
        ("grpo", ["rollout.completion=4"], "--set", "Did you mean 'rollout.completions'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    name: str, assignments: list[str], where: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_online(name, None, assignments)
    assert message in str(caught.value)
    assert not where or str(caught.value.where) in where.split("|")
    assert caught.value.fix or "Did you mean" in message


def test_what_is_refused_for_a_ratio_is_allowed_where_there_is_none() -> None:
    for name in ("online_dpo", "rejection_sampling"):
        assert resolve_online(name, None, ["sampling.top_p=0.9"]).sampling.top_p == 0.9


def test_a_separate_critic_takes_the_place_of_the_value_head() -> None:
    config = resolve_online("ppo", None, ["loss.name=ppo_clip", "critic.model=runs/rm/model", "critic.value_clip=0.1"])
    method = method_of(config)
    assert not method.has_value_head
    assert method.value is not None
    assert method.value.config.model_dump() == {"value_clip": 0.1}


def test_settings_survive_their_file(tmp_path: Path) -> None:
    """config.toml of a run is a --config that gives the same settings, rewards and a server's address included."""
    extra = {
        "rewards": [{"name": "length", "max": 5}, {"name": "regex", "pattern": 'a"b\\d', "weight": 0.5}],
        "sampler": {"url": "http://127.0.0.1:1"},
    }
    config = resolve_online("dapo", None, ["steps=3"], extra)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert resolve_online("dapo", file) == config


def test_an_online_recipe_is_none_of_data() -> None:
    with pytest.raises(ConfigError, match="learns from completions that the policy samples"):
        resolve("grpo")
