"""`accord train RECIPE`: data and a model in, a run directory out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accord.models.network import Network
    from accord.models.render import Renderer
    from accord.train import TrainConfig
    from accord.types import Record

__all__ = ["load_network", "refuse_online", "train"]


def train(
    recipe: str,
    /,
    *,
    model: str,
    out: Path,
    data: tuple[str, ...] = (),
    config: Path | None = None,
    set: tuple[str, ...] = (),
    lora: bool = False,
    resume: bool = False,
    skip_bad: bool = False,
    reward: tuple[str, ...] = (),
    sampler: str | None = None,
    environment: str | None = None,
    processes: int | None = None,
    launcher: Literal["local", "ray"] = "local",
    deepspeed: Path | None = None,
) -> int:
    """Train a model by a recipe.

    A recipe names a loss and its vetted defaults: `sft` learns from demonstrations; `dpo` and its kin from preferences,
    with the model as it is now as the reference; `kto` and its kin from thumbs up and down; `reward` trains a reward
    model on preferences; `ppo`, `grpo` and their kin learn from completions that the model samples, and from rewards
    (docs/online.md). An unknown recipe lists them all.

    Parameters
    ----------
    recipe
        What to do: the name of a recipe.
    model
        Hub id, directory, or `starter`.
    out
        Run directory; must be new unless --resume.
    data
        File (jsonl, csv, parquet, also .gz), directory, or hub id. Of several, DATA=WEIGHT each: rows are drawn in
        these shares, e.g. --data a.jsonl=0.7 --data b.jsonl=0.3; or the same in [data] of --config.
    config
        TOML file with settings over the recipe's.
    set
        One setting, e.g. --set optimizer.learning_rate=1e-5; repeat for more.
    lora
        Train low-rank adapters (and a reward model's score head) instead of all weights.
    resume
        Continue the run in --out.
    skip_bad
        Leave out rows that cannot be used, and list them, instead of stopping at them.
    reward
        Online recipes: a reward, e.g. exact_answer; repeat for more. [[rewards]] of --config can give them settings.
    sampler
        Online recipes: address of a server that samples, e.g. http://127.0.0.1:8001 (docs/sampling.md).
    environment
        Online recipes: what answers the model between its turns, `tools` or ./file.py:Class (docs/online.md).
    processes
        Share the model among so many processes (docs/scale.md); one for each GPU.
    launcher
        Who starts them: `local` on this machine, `ray` on a Ray cluster.
    deepspeed
        DeepSpeed configuration (JSON): read into the settings, under --config and --set.
    """
    options: dict[str, Any] = {"model": model, "data": data, "out": out, "config": config, "set": set, "lora": lora}
    options |= {"resume": resume, "skip_bad": skip_bad, "deepspeed": deepspeed, "reward": reward, "sampler": sampler}
    options["environment"] = environment
    if processes is None and launcher == "ray":
        fix = "Give the number of workers, e.g. --processes 2"
        raise ConfigError("How many workers?", where="--launcher ray", fix=fix)
    if processes is not None:
        return _start_job(recipe, options, processes, launcher)
    if "RANK" not in os.environ:
        _train(recipe, options)
        return 0
    from accord.engine.distributed import process_group

    with process_group():
        _train(recipe, options)
    return 0


def _start_job(recipe: str, options: dict[str, Any], processes: int, launcher: str) -> int:
    """The same command, without the flags that say how it is started, in many processes."""
    from accord.cli import run
    from accord.engine import launch
    from accord.train import Run

    if processes < 1:
        raise ConfigError("There is no job of no process.", where=f"--processes {processes}", fix="Give 1 or more.")
    if "RANK" in os.environ:
        fix = "Leave out --processes: whoever started this process says how many there are."
        raise ConfigError("This process is one of a job already.", where=f"--processes {processes}", fix=fix)
    if launcher == "ray":
        Run(options["out"]).require_free(resume=options["resume"])
        command = _command(recipe, options | {"resume": True})
        return launch.on_ray(run, command, processes, options["out"])
    return launch.on_this_machine(_command(recipe, options), processes)


def _command(recipe: str, options: dict[str, Any]) -> list[str]:
    words = ["train", recipe]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, tuple):
            words += [word for one in value for word in (flag, one)]
        elif value is True:
            words.append(flag)
        elif value:
            words += [flag, str(value)]
    return words


def _train(recipe: str, options: Mapping[str, Any]) -> None:
    """Train in this process, from data or online."""
    from accord.train import Run, is_online
    from accord.train.deepspeed import read_deepspeed

    if os.environ.get("RANK", "0") == "0":  # the others may come when it has begun
        Run(options["out"]).require_free(resume=options["resume"])
    given = dict(options)
    base: dict[str, Any] = {}
    if deepspeed := given.pop("deepspeed"):
        base, idle = read_deepspeed(deepspeed)
        if idle:
            print(f"{deepspeed}: without effect here: {', '.join(idle)}.")
    if is_online(recipe):
        from accord.cli.online import train_online

        train_online(recipe, **given, base=base)
        return
    refuse_online(recipe, given.pop("reward"), given.pop("sampler"), given.pop("environment"))
    _train_on_data(recipe, **given, base=base)


def _train_on_data(
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
    base: Mapping[str, Any],
) -> None:
    from accord.cli.examples import Examples, settings_of
    from accord.engine.memory import touch_ahead
    from accord.losses import LabelConfig
    from accord.models.starter import STARTER, starter_directory
    from accord.train import bind_loss, view_of
    from accord.types import LabelledCompletion

    settings = settings_of(recipe, data, config, set, base, lora=lora)
    view = view_of(settings)
    if not settings.lora and not settings.reward_model.frozen_layers:
        touch_ahead(starter_directory() if model == STARTER else Path(model))
    # The data is read before the model is loaded: a faulty row costs seconds, not minutes.
    examples = Examples(data, settings, view.kind, skip_bad=skip_bad)
    loss_config = bind_loss(settings).config
    if isinstance(loss_config, LabelConfig):
        labels = [record.label for record in examples.records if isinstance(record, LabelledCompletion)]
        print(loss_config.balance(sum(labels), len(labels) - sum(labels)))

    from accord.engine.distributed import rank
    from accord.models.network import RewardModel
    from accord.models.render import Renderer
    from accord.train import Run, provenance, train_ensemble
    from accord.train import train as train_one
    from accord.train.examples import StreamedTrees

    network = load_network(model, view.network is RewardModel, settings, examples.records)
    renderer = Renderer(network, settings.max_tokens)
    trees = examples.trees(renderer, out / "skipped.jsonl" if skip_bad else None)
    if not examples.large:
        _say_cut(renderer.truncated, "completions", renderer)
    facts = provenance(network, model, examples.name, trees, settings.seed)
    run = Run.open(out, settings, facts, resume=resume)
    if run.finished:
        print(f"This run is finished: {run.model}")
        return
    if rank() == 0:
        examples.list_left_out(out / "skipped.jsonl")
    train_loop = train_ensemble if settings.reward_model.members > 1 else train_one
    train_loop(network, trees, settings, run, stage=f"Train {recipe}")
    if isinstance(trees, StreamedTrees):
        _say_cut(trees.truncated, "rows", renderer)
        if trees.skipped:
            print(f"{trees.skipped:,} rows could not be used and were left out: {out / 'skipped.jsonl'}")
    print(f"Model: {run.model}")
    if view.network is RewardModel:
        kind = " --kind ratings" if view.kind == "ratings" else ""
        print(f"Next: accord evaluate reward --model {run.model} --data HELD_OUT{kind} --out {run.directory}-accuracy")
    else:
        print(f"Next: accord chat --model {run.model}")


def refuse_online(recipe: str, reward: tuple[str, ...], sampler: str | None, environment: str | None = None) -> None:
    """What belongs to online recipes alone.

    Raises:
        ConfigError: it is given.
    """
    for flag, value in (("--reward", reward), ("--sampler", sampler), ("--environment", environment)):
        if value:
            what = f"The recipe {recipe!r} learns from data, not from what the model samples."
            raise ConfigError(what, where=flag, fix="Leave it out, or use an online recipe, such as grpo.")


def load_network(model: str, rewards: bool, settings: TrainConfig, records: Sequence[Record]) -> Network:
    """The network that the loss reads; a new reward model of ratings gets their attributes."""
    from accord.engine.distributed import load_device
    from accord.models.attributes import attributes_of
    from accord.models.load import load_policy, load_reward_model
    from accord.types import RatedCompletion

    common: dict[str, Any] = {"chat_template": settings.template(), "device": load_device()}
    if not rewards:
        return load_policy(model, **common)
    rated = [record for record in records if isinstance(record, RatedCompletion)]
    attributes = attributes_of(rated, settings.reward_model.attributes) if rated else ()
    return load_reward_model(model, settings.reward_model, attributes=attributes, **common)


def _say_cut(count: int, noun: str, renderer: Renderer) -> None:
    if count:
        limit = f"{renderer.max_tokens:,} tokens is the limit (see `accord data show`)"
        print(f"{count:,} {noun} were cut: {limit}.")
