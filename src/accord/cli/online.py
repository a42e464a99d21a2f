"""`accord train` by a recipe that learns from what the model samples: prompts and rewards in, a run directory out."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accord.errors import MissingDataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accord.environments import Environments
    from accord.models.network import Critic, Policy
    from accord.models.render import Renderer
    from accord.rewards import Rewards
    from accord.sampling.sampler import Sampler
    from accord.train import OnlineConfig
    from accord.train.conversations import Conversations
    from accord.train.rollouts import EncodedPrompt
    from accord.types import Prompt

__all__ = ["reference_of", "train_online"]


def train_online(
    recipe: str,
    *,
    model: str,
    data: tuple[str, ...],
    out: Path,
    config: Path | None,
    set: tuple[str, ...],
    lora: bool,
    resume: bool,
    skip_bad: bool,
    reward: tuple[str, ...],
    sampler: str | None,
    environment: str | None,
    base: Mapping[str, Any],
) -> None:
    """Train by an online recipe; see `accord.cli.train.train`.

    Args:
        base: settings under all others.
    """
    from accord.cli.examples import Examples, online_settings_of
    from accord.engine.actors import require_ray
    from accord.environments import environments_of
    from accord.types import Prompt

    settings = online_settings_of(
        recipe, data, config, set, base, lora=lora, rewards=reward, sampler=sampler, environment=environment
    )
    if settings.workers.samplers or settings.workers.rewards:
        require_ray("[workers]")
    # Data and rewards are read before the model is loaded: what is wrong with them costs seconds, not minutes.
    examples = Examples(data, settings, "prompts", skip_bad=skip_bad)
    prompts = [record for record in examples.records if isinstance(record, Prompt)]

    from accord.engine.distributed import load_device, rank
    from accord.models.load import load_policy, load_tokenizer
    from accord.models.render import Renderer
    from accord.train import Run, encode_prompts, provenance
    from accord.train import train_online as train

    tokenizer = load_tokenizer(model, chat_template=settings.template())
    environments = environments_of(settings.environment, tokenizer) if settings.environment else None
    with ExitStack() as workers:
        # Of a job's processes the first one has the rewards and the sampler.
        rewards = _rewards(tokenizer, settings, prompts, workers) if rank() == 0 else None
        policy = load_policy(model, chat_template=settings.template(), device=load_device())
        critic, reference = _critic(settings, policy), reference_of(model, settings, policy)
        bad: list[Any] = []
        renderer = Renderer(policy, settings.max_tokens)
        talk = _conversations(environments, renderer, settings, prompts)
        tools = environments.tools if environments else ()
        encoded = encode_prompts(renderer, prompts, settings.sampling.max_new_tokens, bad if skip_bad else None, tools)
        for error in bad:
            print(f"Left out: {error}")
        facts = provenance(policy, model, examples.name, [], settings.seed)
        facts["data"] = {"name": examples.name, "rows": len(encoded), "hash": _hash(encoded, fields=bool(environments))}
        run = Run.open(out, settings, facts, resume=resume)
        if run.finished:
            print(f"This run is finished: {run.model}")
            return
        if rank() == 0:
            examples.list_left_out(out / "skipped.jsonl")
        train(
            policy,
            encoded,
            rewards,
            settings,
            run,
            stage=f"Train {recipe}",
            reference=reference,
            critic=critic,
            sampler=_sampler(model, settings, out, workers) if rank() == 0 else None,
            conversations=talk,
        )
    print(f"Model: {run.model}")
    print(f"What was sampled: {out / 'rollouts.sqlite'}")
    print(f"Next: accord chat --model {run.model}")


def _conversations(
    environments: Environments | None, renderer: Renderer, settings: OnlineConfig, prompts: Sequence[Prompt]
) -> Conversations | None:
    """How policy and environments talk, once the chat template was tried with the first prompt."""
    from accord.train.conversations import Conversations

    if environments is None:
        return None
    renderer.check_turns(prompts[0].content, environments.role, environments.tools, prompts[0].source)
    rewarded = any(each["name"] == "environment" for each in settings.rewards)
    return Conversations(environments, renderer, settings.sampling, rewarded=rewarded)


def _rewards(tokenizer: Any, settings: OnlineConfig, prompts: Sequence[Prompt], workers: ExitStack) -> Rewards:
    """The rewards, checked against the prompts; where the settings say so, other processes score."""
    from accord.rewards import Rewards
    from accord.rewards.workers import ray_rewards

    if not settings.rewards:
        return Rewards.none()
    if settings.workers.rewards:
        rewards = workers.enter_context(ray_rewards(settings.rewards, tokenizer, settings.workers.rewards))
    else:
        rewards = Rewards(settings.rewards, tokenizer)
    rewards.check(prompts)
    return rewards


def _sampler(model: str, settings: OnlineConfig, out: Path, workers: ExitStack) -> Sampler | None:
    """What samples in other processes, if the settings name it."""
    from accord.sampling.http import connect
    from accord.sampling.pool import ray_samplers

    if settings.workers.samplers:
        exchange, precision = out.absolute() / "exchange", settings.engine.precision
        return workers.enter_context(ray_samplers(model, precision, settings.workers.samplers, exchange))
    return connect(settings.sampler) if settings.sampler else None


def reference_of(model: str, settings: OnlineConfig, policy: Policy) -> Policy | None:
    """A teacher; or the model once more, where a reference is read and no adapter can be switched off instead."""
    from accord.engine.distributed import load_device
    from accord.models.load import load_policy
    from accord.train import method_of

    method = method_of(settings)
    if method.teacher is None:
        wanted = method.reads_reference and not settings.lora
        return load_policy(model, chat_template=settings.template(), device=load_device()) if wanted else None
    teacher = load_policy(method.teacher, device=load_device())
    if teacher.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        fix = "Name a teacher of the same family: what it says of a token must be of the same token."
        where = f"advantage.teacher {method.teacher}"
        raise ModelError("Its tokens are not those of the policy.", where=where, fix=fix)
    return teacher


def _critic(settings: OnlineConfig, policy: Policy) -> Critic | None:
    """The critic of its own that the settings name, if they do; a value head is looked for only."""
    from accord.engine.distributed import load_device
    from accord.models.load import load_critic

    if settings.critic is None:
        return None
    head = settings.critic.value_head
    if head and not Path(head).is_file():
        fix = "Give critic.safetensors of a run of the loss ppo."
        raise MissingDataError("There is no such file.", where=f"critic.value_head {head}", fix=fix)
    name = settings.critic.model
    return load_critic(name, policy.tokenizer, device=load_device()) if name else None


def _hash(prompts: Sequence[EncodedPrompt], *, fields: bool) -> str:
    """Of everything that sampling, rewards and (`fields`) environments read of a prompt."""
    state = hashlib.blake2b(digest_size=16)
    for each in prompts:
        state.update(len(each.ids_P).to_bytes(8, "little") + each.ids_P.tobytes())
        state.update(repr((each.prompt.content, each.prompt.answer, each.prompt.requirements)).encode())
        if fields:
            state.update(repr(each.prompt.fields).encode())
    return state.hexdigest()
