"""`accord train sft|reward|dpo`: data and a model in, a run directory out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accord.models.network import Network
    from accord.models.trees import Tree
    from accord.train import Run

__all__ = ["dpo", "reward", "sft"]

Kind = Literal["sft", "reward", "dpo"]


def sft(
    *,
    model: str,
    data: str,
    out: Path,
    config: Path | None = None,
    set: tuple[str, ...] = (),
    lora: bool = False,
    resume: bool = False,
) -> None:
    """Supervised fine-tuning on demonstrations.

    Parameters
    ----------
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
        Train low-rank adapters instead of all weights.
    resume
        Continue the run in --out.
    """
    _train("sft", model, data, out, config, set, lora=lora, resume=resume)


def reward(
    *,
    model: str,
    data: str,
    out: Path,
    config: Path | None = None,
    set: tuple[str, ...] = (),
    lora: bool = False,
    resume: bool = False,
) -> None:
    """Train a reward model on preference pairs or rankings.

    Parameters
    ----------
    model
        Hub id, directory, or `starter`.
    data
        File (jsonl, csv, parquet, also .gz), directory, or hub id.
    out
        Run directory; must be new unless --resume.
    config
        TOML file with settings over the recipe's.
    set
        One setting, e.g. --set loss.centre=0.01; repeat for more.
    lora
        Train low-rank adapters (and the score head) instead of all weights.
    resume
        Continue the run in --out.
    """
    _train("reward", model, data, out, config, set, lora=lora, resume=resume)


def dpo(
    *,
    model: str,
    data: str,
    out: Path,
    config: Path | None = None,
    set: tuple[str, ...] = (),
    lora: bool = False,
    resume: bool = False,
) -> None:
    """Direct preference optimisation on preference pairs.

    Parameters
    ----------
    model
        Hub id, directory, or `starter`; as it is now, it is also the reference.
    data
        File (jsonl, csv, parquet, also .gz), directory, or hub id.
    out
        Run directory; must be new unless --resume.
    config
        TOML file with settings over the recipe's.
    set
        One setting, e.g. --set loss.beta=0.2; repeat for more.
    lora
        Train low-rank adapters instead of all weights.
    resume
        Continue the run in --out.
    """
    _train("dpo", model, data, out, config, set, lora=lora, resume=resume)


def _train(
    kind: Kind,
    model: str,
    data: str,
    out: Path,
    file: Path | None,
    assignments: tuple[str, ...],
    *,
    lora: bool,
    resume: bool,
) -> None:
    from accord.config import parse_assignments
    from accord.data.load import load
    from accord.train import resolve

    extra: dict[str, Any] = {"lora": {}} if lora and "lora" not in parse_assignments(assignments) else {}
    config = resolve(kind, file, assignments, extra)
    # The data is read before the model is loaded: a faulty row costs seconds, not minutes.
    loaded = load(data, kind)
    print(loaded.summary())

    from accord.models.load import load_policy, load_reward_model
    from accord.models.render import Renderer
    from accord.train import Run, provenance, train

    network: Network = (load_reward_model if kind == "reward" else load_policy)(model, chat_template=config.template())
    renderer = Renderer(network, config.max_tokens)
    trees: Sequence[Tree] = [renderer.tree(record) for record in loaded.records]
    if renderer.truncated:
        limit = f"{renderer.max_tokens:,} tokens is the limit (see `accord data show`)"
        print(f"{renderer.truncated:,} completions were cut: {limit}.")
    run = Run.open(out, config, provenance(network, model, data, trees, config.seed), resume=resume)
    if run.finished:
        print(f"This run is finished: {run.model}")
        return
    train(network, trees, config, run, stage={"sft": "SFT", "reward": "Reward model", "dpo": "DPO"}[kind])
    _say_next(kind, run)


def _say_next(kind: Kind, run: Run) -> None:
    print(f"Model: {run.model}")
    if kind == "reward":
        print(f"Next: accord evaluate reward --model {run.model} --data HELD_OUT --out {run.directory}-accuracy")
    else:
        print(f"Next: accord chat --model {run.model}")
