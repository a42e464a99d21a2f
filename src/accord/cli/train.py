"""`accord train RECIPE`: data and a model in, a run directory out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accord.models.network import Network

__all__ = ["train"]


def train(
    recipe: str,
    /,
    *,
    model: str,
    data: str,
    out: Path,
    config: Path | None = None,
    set: tuple[str, ...] = (),
    lora: bool = False,
    resume: bool = False,
) -> None:
    """Train a model by a recipe.

    A recipe names a loss and its vetted defaults: `sft` learns from demonstrations; `dpo` and its kin from preferences,
    with the model as it is now as the reference; `kto` and its kin from thumbs up and down; `reward` trains a reward
    model on preferences. An unknown recipe lists them all.

    Parameters
    ----------
    recipe
        What to do: the name of a recipe.
    model
        Hub id, directory, or `starter`.
    data
        File (jsonl, csv, parquet, also .gz), directory, or hub id.
    out
        Run directory; must be new unless --resume.
    config
        TOML file with settings over the recipe's.
    set
        One setting, e.g. --set optimizer.learning_rate=1e-5; repeat for more.
    lora
        Train low-rank adapters (and a reward model's score head) instead of all weights.
    resume
        Continue the run in --out.
    """
    from accord.config import parse_assignments
    from accord.data.load import load
    from accord.losses import LabelConfig
    from accord.train import bind_loss, resolve, view_of
    from accord.types import LabelledCompletion

    extra: dict[str, Any] = {"lora": {}} if lora and "lora" not in parse_assignments(set) else {}
    settings = resolve(recipe, config, set, extra)
    view = view_of(settings)
    # The data is read before the model is loaded: a faulty row costs seconds, not minutes.
    loaded = load(data, view.kind)
    print(loaded.summary())
    loss_config = bind_loss(settings).config
    if isinstance(loss_config, LabelConfig):
        labels = [record.label for record in loaded.records if isinstance(record, LabelledCompletion)]
        print(loss_config.balance(sum(labels), len(labels) - sum(labels)))

    from accord.models.load import load_policy, load_reward_model
    from accord.models.network import RewardModel
    from accord.models.render import Renderer
    from accord.train import Run, provenance
    from accord.train import train as train_loop

    network: Network
    if view.network is RewardModel:
        network = load_reward_model(model, settings.reward_model, chat_template=settings.template())
    else:
        network = load_policy(model, chat_template=settings.template())
    renderer = Renderer(network, settings.max_tokens)
    trees = [renderer.tree(record) for record in loaded.records]
    if renderer.truncated:
        limit = f"{renderer.max_tokens:,} tokens is the limit (see `accord data show`)"
        print(f"{renderer.truncated:,} completions were cut: {limit}.")
    run = Run.open(out, settings, provenance(network, model, data, trees, settings.seed), resume=resume)
    if run.finished:
        print(f"This run is finished: {run.model}")
        return
    train_loop(network, trees, settings, run, stage=f"Train {recipe}")
    print(f"Model: {run.model}")
    if view.network is RewardModel:
        print(f"Next: accord evaluate reward --model {run.model} --data HELD_OUT --out {run.directory}-accuracy")
    else:
        print(f"Next: accord chat --model {run.model}")
