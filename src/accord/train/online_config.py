"""Settings of online training, and what they amount to: the loss decides what becomes of sampled completions.

A loss of rollouts takes all of them, with advantages; a loss of preferences takes the best and the worst of a prompt as
a pair; a loss of demonstrations imitates the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from accord.advantages import ADVANTAGES, Average, BoundAdvantage, ReverseKLConfig
from accord.config import Config, merge, parse_assignments, read_template, read_toml
from accord.engine.engine import EngineConfig
from accord.engine.optimizer import OptimizerConfig
from accord.engine.views import VIEWS, View
from accord.errors import ConfigError
from accord.losses import LOSSES, BoundLoss, PolicyConfig, RatioConfig
from accord.models.lora import LoRAConfig
from accord.models.network import Policy
from accord.sampling.connection import HTTPConfig
from accord.sampling.request import SamplingConfig
from accord.tracking import require_trackers
from accord.train.config import recipe

__all__ = [
    "CriticConfig",
    "Method",
    "OnlineConfig",
    "RolloutConfig",
    "WorkersConfig",
    "importance_cap_of",
    "is_online",
    "learns_afresh",
    "method_of",
    "resolve_online",
]

_IMPORTANCE_CAP = 2.0


class RolloutConfig(Config):
    """How many completions a step samples, and what is done with them."""

    completions: int = Field(8, gt=0)
    """Completions per prompt."""
    epochs: int = Field(1, gt=0)
    """How often a step goes through its completions."""
    mini_batches: int = Field(1, gt=0)
    """Optimiser updates in which it does so each time; a prompt's completions stay together."""
    average: Average = "sequence"
    """A loss of rollouts is averaged over tokens (`token`, DAPO), over completions of which each averages its tokens
    (`sequence`, GRPO), or over the tokens that there could have been (`constant`, Dr.GRPO)."""
    dynamic_sampling: int = Field(0, ge=0)
    """Replace prompts whose completions all have the same score by others, so many times at most (DAPO); what is left
    of them is not trained on."""
    overlong_buffer: float = Field(0.0, ge=0, le=1)
    """The last share of `max_new_tokens`, in which a completion's score falls, by 1 in all (DAPO, eq. 13); 0: none."""
    eos_penalty: float = Field(0.0, ge=0)
    """Taken from the score of a completion that the token limit ended."""
    kl_stop: float | None = Field(None, gt=0)
    """Leave a step's remaining updates once `policy/approxkl_avg` of one is above this, in nats per token."""
    min_reward: float | None = None
    """Imitate a prompt's best completion only if its score is at least this (rejection sampling)."""
    max_staleness: int = Field(0, ge=0)
    """Steps by which the weights that sample may be older than those that learn: so many steps are sampled ahead while
    training goes on. 0: a step is sampled by the weights that it trains."""
    importance_cap: Annotated[float, Field(ge=0)] | None = None
    """Largest importance weight of a token that other weights, or other numerics, have sampled; 0: no such weights, the
    loss's own ratio is taken to what sampled (default: 2 with `max_staleness`, and where a step of several updates
    takes the ratio of whole completions)."""


class CriticConfig(Config):
    """Where values come from: a critic apart from the policy, or the value head of an earlier run."""

    model: str | None = None
    """Where a critic of its own starts: a reward model, whose head becomes the value head; `critic/` of an earlier run;
    or a language model. Its tokens must be the policy's."""
    value_head: str | None = None
    """`critic.safetensors` of an earlier run, whose policy is trained further: the value head on its trunk goes on."""
    value_clip: float = Field(0.2, ge=0)
    """How far a value may move from what it was when sampled before its gradient ends; 0: any distance."""
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.model is None) == (self.value_head is None):
            raise ValueError("name either model or value_head")
        if self.value_head and self != CriticConfig.model_construct(value_head=self.value_head):
            raise ValueError("a value head is trained with the policy: value_clip and optimizer have no effect here")
        return self


class WorkersConfig(Config):
    """Processes of a Ray cluster beside those that train (`--launcher ray`)."""

    samplers: int = Field(0, ge=0)
    """Processes that sample, each with the whole model, on a GPU of its own where there are any; 0: those that train
    do it."""
    rewards: int = Field(0, ge=0)
    """Processes that score, each with all rewards; 0: the first process that trains does it."""


class OnlineConfig(Config):
    """Everything that decides what an online run computes."""

    loss: dict[str, Any]
    """`name` and the settings of that loss."""
    advantage: dict[str, Any] | None = None
    """`name` and the settings of the advantage, where the loss reads one."""
    rewards: tuple[dict[str, Any], ...] = ()
    """One table [[rewards]] for each reward: `name`, `weight` and its own settings (docs/rewards.md)."""
    data: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(None, min_length=1)
    """Several sets of prompts and the weight of each, as for `accord data mix` (default: the one given with --data)."""
    steps: int | None = Field(None, gt=0)
    """Batches of prompts to sample and train on (default: each prompt once)."""
    batch_size: int = Field(8, gt=0)
    """Prompts per step."""
    max_tokens: int | None = Field(None, gt=1)
    """Longest prompt with completion (default: the model's context). A prompt that leaves no room for
    `sampling.max_new_tokens` is an error."""
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(100, gt=0)
    """Steps between checkpoints; a killed run trains at most this many again, on completions that it has kept."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the model's own chat template."""
    samples: int = Field(4, ge=0)
    """Prompts of which samples.html shows the completions and their rewards; 0: no such page."""
    trackers: tuple[str, ...] = ()
    """Who else is told of the metrics: `tensorboard`, `wandb`, `mlflow`, `trackio` (docs/tracking.md)."""
    lora: LoRAConfig | None = None
    critic: CriticConfig | None = None
    """Where the advantage reads values: a critic of its own, or a value head to begin with (default: a new value head
    on the policy's trunk, which the loss `ppo` trains)."""
    environment: dict[str, Any] | None = None
    """What answers the policy between its turns: `name` and the settings of that environment
    (docs/online.md)."""
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()
    sampler: HTTPConfig | None = None
    """A server that samples (default: this process does)."""
    workers: WorkersConfig = WorkersConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()

    def template(self) -> str | None:
        """The text of `chat_template`."""
        return read_template(self.chat_template)

    @property
    def samples_elsewhere(self) -> bool:
        """Whether other processes than those that train sample."""
        return self.sampler is not None or self.workers.samplers > 0


@dataclass(frozen=True, slots=True)
class Method:
    """What checked settings amount to.

    Attributes:
        advantage: a new one, with an empty memory; None where the loss reads none.
        value: the loss of a separate critic, if there is one.
    """

    loss: BoundLoss
    advantage: BoundAdvantage | None
    value: BoundLoss | None

    @property
    def view(self) -> View:
        """What the loss reads."""
        return VIEWS[self.loss.loss.inputs]

    @property
    def has_value_head(self) -> bool:
        """Whether values come from a head on the policy's trunk."""
        return "values" in self.loss.loss.statistics

    @property
    def reads_reference(self) -> bool:
        """Whether the reference model is needed, in the loss or in the reward."""
        return self.view.reference or (self.advantage is not None and self.advantage.needs_reference)

    @property
    def reads_scores(self) -> bool:
        """Whether rewards are needed."""
        return self.advantage is None or self.advantage.advantage.reads_scores

    @property
    def teacher(self) -> str | None:
        """The model that is the reference, where it is not the policy as it is before training."""
        config = self.advantage.config if self.advantage else None
        return config.teacher if isinstance(config, ReverseKLConfig) else None

    @property
    def may_skip(self) -> bool:
        """Whether completions without an advantage change nothing, so that they need not be computed."""
        return self.loss.loss.only_advantage and self.value is None


def is_online(name: str) -> bool:
    """Whether a recipe learns from what the policy samples: it then has a table [rollout]."""
    return "rollout" in recipe(name)


def resolve_online(
    name: str,
    file: Path | None = None,
    assignments: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> OnlineConfig:
    """Recipe, then `base`, the file, --set, and `extra`; the result is checked as a whole."""
    layers = [recipe(name), base or {}, read_toml(file) if file else {}, parse_assignments(assignments), extra or {}]
    config = OnlineConfig.build(merge(*layers), where=str(file) if file else "--set")
    method_of(config)
    require_trackers(config.trackers)
    return config


def method_of(config: OnlineConfig) -> Method:
    """Loss, advantage and critic that the settings name.

    Raises:
        ConfigError: a wrong setting, one that would change nothing, or several that do not go together.
    """
    settings = dict(config.loss)
    bound = LOSSES[str(settings.pop("name", ""))].bind(settings)
    view = VIEWS[bound.loss.inputs]
    if view.network is not Policy or view.kind not in ("prompts", "preferences", "demonstrations") or view.controls:
        what = f"The loss {config.loss['name']!r} does not learn from what a policy samples."
        fix = "Name a loss of rollouts (docs/losses.md), of preferences (dpo, …) or of demonstrations (sft)."
        raise ConfigError(what, where="loss.name", fix=fix)
    if config.environment is None and any(each.get("name") == "environment" for each in config.rewards):
        fix = "Name one: --environment ./file.py:Class; or leave out the reward."
        raise ConfigError("There is no environment that could give rewards.", where="rewards", fix=fix)
    _check_sampling(config, view)
    _check_updates(config, bound, view)
    _check_staleness(config, bound, view)
    _check_workers(config)
    if view.kind == "prompts":
        return _with_advantage(config, bound)
    _check_examples(config, view)
    return Method(bound, None, None)


def importance_cap_of(config: OnlineConfig) -> float:
    """The largest importance weight of a token; 0 where tokens are not weighted so."""
    if config.rollout.importance_cap is not None:
        return config.rollout.importance_cap
    if _takes_ratio_of_completions(config):
        return 0.0 if learns_afresh(config) else _IMPORTANCE_CAP
    is_weighted = config.rollout.max_staleness and VIEWS[LOSSES[str(config.loss["name"])].inputs].kind == "prompts"
    return _IMPORTANCE_CAP if is_weighted else 0.0


def learns_afresh(config: OnlineConfig) -> bool:
    """Whether the ratio of completions is taken to the policy that learns: one update on what it has just sampled.

    What sampling and training round differently in each token adds up over a completion to more than the loss clips.
    """
    rollout = config.rollout
    is_stale = rollout.max_staleness or rollout.importance_cap is not None
    return _takes_ratio_of_completions(config) and not is_stale and rollout.epochs * rollout.mini_batches == 1


def _takes_ratio_of_completions(config: OnlineConfig) -> bool:
    return config.loss.get("ratio_level", "token") != "token"


def _with_advantage(config: OnlineConfig, bound: BoundLoss) -> Method:
    settings, rollout = dict(config.advantage or {}), config.rollout
    if "name" not in settings:
        what = f"The loss {config.loss['name']!r} reads an advantage, and none is named."
        raise ConfigError(what, where="[advantage]", fix=f"Set advantage.name to one of: {', '.join(ADVANTAGES)}.")
    advantage = ADVANTAGES[str(settings.pop("name"))].bind(settings)
    method = Method(bound, advantage, _value_loss(config.critic))
    row, name = advantage.advantage, (config.advantage or {})["name"]
    if config.critic and config.critic.value_head and not method.has_value_head:
        what = f"The loss {config.loss['name']!r} trains no value head."
        raise ConfigError(what, where="critic.value_head", fix='Use loss.name = "ppo", or name critic.model.')
    if not row.reads_scores:
        _check_without_scores(config, str(name), bound)
    if row.needs_values and not (method.has_value_head or method.value):
        what = f"The advantage {name!r} reads a critic's values, and nothing gives them."
        fix = 'Use loss.name = "ppo" (a value head on the policy), or name a model in [critic].'
        raise ConfigError(what, where="advantage.name", fix=fix)
    if method.has_value_head and method.value:
        what = f"The loss {config.loss['name']!r} trains a value head, so a critic of its own would be idle."
        raise ConfigError(what, where="[critic]", fix='Leave it out, or use loss.name = "ppo_clip".')
    if not row.needs_values and (method.has_value_head or method.value):
        what = f"The advantage {name!r} reads no values, so a critic would be idle."
        fix = 'Use advantage.name = "gae"; or a loss without a critic, such as "ppo_clip".'
        raise ConfigError(what, where="[critic]" if method.value else "loss.name", fix=fix)
    if (row.compares or rollout.dynamic_sampling) and rollout.completions < 2:
        what = "Completions of one prompt are compared, and a single one is sampled."
        raise ConfigError(what, where="rollout.completions", fix="Sample two or more.")
    if rollout.eos_penalty and hasattr(advantage.config, "missing_eos_penalty"):
        what = f"The advantage {name!r} has a penalty of its own for completions that do not end."
        raise ConfigError(what, where="rollout.eos_penalty", fix="Set advantage.missing_eos_penalty instead.")
    if rollout.min_reward is not None:
        what = "All completions are learned from, good or bad."
        raise ConfigError(what, where="rollout.min_reward", fix="Leave it out, or use the recipe rejection_sampling.")
    return method


def _check_without_scores(config: OnlineConfig, name: str, bound: BoundLoss) -> None:
    """Settings that would change nothing where no score is read."""
    rollout, kl = config.rollout, getattr(bound.config, "kl_coefficient", 0)
    idle = {
        "rewards": config.rewards,
        "workers.rewards": config.workers.rewards,
        "rollout.dynamic_sampling": rollout.dynamic_sampling,
        "rollout.overlong_buffer": rollout.overlong_buffer,
        "rollout.eos_penalty": rollout.eos_penalty,
    }
    for where, value in idle.items():
        if value:
            what = f"The advantage {name!r} reads no score, so this would be ignored."
            raise ConfigError(what, where=where, fix="Leave it out.")
    if kl:
        what = "The reference is the teacher, from which the policy learns already."
        raise ConfigError(what, where="loss.kl_coefficient", fix="Leave it out.")


def _value_loss(critic: CriticConfig | None) -> BoundLoss | None:
    return LOSSES["value"].bind({"value_clip": critic.value_clip}) if critic and critic.model else None


def _check_sampling(config: OnlineConfig, view: View) -> None:
    sampling = config.sampling
    if sampling.temperature == 0:
        what = "At temperature 0 all completions of a prompt are the same."
        raise ConfigError(what, where="sampling.temperature", fix="Use 1.0, or another temperature above 0.")
    shaped = {"top_p": sampling.top_p < 1, "top_k": sampling.top_k > 0, "min_p": sampling.min_p > 0}
    shaped["logit_bias"] = bool(sampling.logit_bias)
    for name, is_set in shaped.items():
        if is_set and view.kind == "prompts":
            what = (
                "Completions would come from another distribution than the one that is trained: the ratio of the two "
                "would be biased."
            )
            raise ConfigError(what, where=f"sampling.{name}", fix="Leave it out; the temperature may be set.")


def _check_updates(config: OnlineConfig, bound: BoundLoss, view: View) -> None:
    rollout, updates = config.rollout, config.rollout.epochs * config.rollout.mini_batches
    if rollout.mini_batches > config.batch_size:
        what = f"{config.batch_size} prompts cannot be divided into {rollout.mini_batches} mini-batches."
        raise ConfigError(what, where="rollout.mini_batches", fix="Lower it, or raise batch_size.")
    if rollout.kl_stop is not None and (updates == 1 or view.kind != "prompts"):
        what = "A step of one update has nothing to leave." if updates == 1 else "This loss measures no KL to stop at."
        raise ConfigError(what, where="rollout.kl_stop", fix="Leave it out.")
    if isinstance(bound.config, PolicyConfig) and not isinstance(bound.config, RatioConfig) and updates > 1:
        what = f"The loss {config.loss['name']!r} is for one update on what the policy has just sampled."
        fix = 'Set rollout.epochs and rollout.mini_batches to 1, or use loss.name = "ppo_clip".'
        raise ConfigError(what, where="[rollout]", fix=fix)


def _check_workers(config: OnlineConfig) -> None:
    if config.sampler and config.workers.samplers:
        what = "A server samples already."
        raise ConfigError(what, where="workers.samplers", fix="Leave it out, or --sampler and [sampler].")


def _check_staleness(config: OnlineConfig, bound: BoundLoss, view: View) -> None:
    rollout, cap = config.rollout, config.rollout.importance_cap
    if rollout.max_staleness and rollout.dynamic_sampling:
        what = "Which prompts a step takes would depend on rewards that are not there when it is sampled ahead."
        raise ConfigError(what, where="rollout.max_staleness", fix="Leave it out, or rollout.dynamic_sampling.")
    if cap is None:
        return
    if view.kind != "prompts":
        what = f"The loss {config.loss['name']!r} takes no ratio to what sampled, so this would be ignored."
    elif not (rollout.max_staleness or _takes_ratio_of_completions(config)) and (config.sampler is None or cap == 0):
        what = "The weights that sample are those that learn, so there is nothing to correct."
    elif 0 < cap < 1:
        what = "A cap below 1 weighs down also what the policy has just sampled."
        raise ConfigError(what, where="rollout.importance_cap", fix="Use 2.0, at least 1, or 0 for no weights.")
    elif cap == 0 and not isinstance(bound.config, RatioConfig):
        what = f"The loss {config.loss['name']!r} has no ratio that would make up for older weights."
        raise ConfigError(what, where="rollout.importance_cap", fix="Leave it out.")
    else:
        return
    raise ConfigError(what, where="rollout.importance_cap", fix="Leave it out.")


def _check_examples(config: OnlineConfig, view: View) -> None:
    """Settings that a loss of pairs or of demonstrations would ignore."""
    name, rollout = config.loss["name"], config.rollout
    pairs = view.kind == "preferences"
    if config.advantage is not None or config.critic is not None:
        where = "[advantage]" if config.advantage is not None else "[critic]"
        what = f"The loss {name!r} reads no advantage, so this would be ignored."
        raise ConfigError(what, where=where, fix="Remove it, or name a loss of rollouts, such as ppo_clip.")
    if rollout.average != "sequence":
        what = f"The loss {name!r} has an average of its own, so this would be ignored."
        raise ConfigError(what, where="rollout.average", fix="Leave it out.")
    if pairs and rollout.min_reward is not None:
        what = "A pair needs a better and a worse completion, whatever their scores."
        raise ConfigError(what, where="rollout.min_reward", fix="Leave it out.")
    if rollout.completions < 2 and (pairs or rollout.dynamic_sampling or rollout.min_reward is None):
        what = "The best of a prompt's completions is sought, and a single one is sampled."
        raise ConfigError(what, where="rollout.completions", fix="Sample two or more.")
