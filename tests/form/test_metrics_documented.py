"""docs/metrics.md has every metric that a run logs, no other, and every rule of health with its limits.

What is logged is not guessed from the source: every recipe trains a tiny model for a step, some with settings that add
metrics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch

from accord.cli import run
from accord.models.tiny import save_tiny
from accord.tracking import RULES, read_metrics
from accord.train import is_online, resolve, view_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
RECIPES = sorted(
    path.name.removesuffix(".toml") for path in resources.files("accord.train").joinpath("recipes").iterdir()
)

MORE = [
    ("sft", "loss.label_smoothing=0.1", "validation.share=0.3"),
    ("dpo", "loss.sft_weight=0.1"),
    ("grpo", "loss.kl_coefficient=0.1", "loss.dual_clip=3.0", "rollout.dynamic_sampling=1"),
    ("grpo", "rollout.max_staleness=1"),
    ("ppo", "loss.name=ppo_clip", "critic.model=MODEL", "advantage.kl_target=6.0"),
    ("grpo", "environment.name=DIRECTORY/rewards.py:Talk", "environment.max_turn_tokens=4"),
]
"""Recipes with settings that add metrics."""

REWARD = """
from accord.environments import End, Observation
from accord.types import Message


def half(prompts, completions):
    "Nothing of every third completion."
    return [None if k % 3 == 2 else t.token_ids[0] / 259 for k, t in enumerate(completions)]


class Talk:
    "Asks back once; what it counts has a name of its own."

    def __init__(self, prompt, seed):
        pass

    def reply(self, turn):
        if turn.number == 1:
            return Observation((Message("user", "?"),), parts={"questions": 1})
        return End()
"""
COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]


def tables(page: str) -> Iterator[tuple[str, list[str]]]:
    """Every row of every table: the heading above it, and its cells."""
    heading = ""
    for line in page.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| `"):
            yield heading, [cell.strip() for cell in line.strip("|").split(" | ")]


def documented() -> set[str]:
    rows = list(tables(PAGE.read_text(encoding="utf-8")))
    return {cells[0].strip("` ") for heading, cells in rows if heading != "Verdicts"}


def pattern(name: str) -> str:
    """Words in capitals stand for anything."""
    return re.sub(r"[A-Z]{3,}", ".+", re.escape(name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, and data of every kind."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("metrics")
    save_tiny(directory / "model", "llama")
    (directory / "rewards.py").write_text(REWARD)
    prompts = [{"prompt": f"Say {colour}:"} for colour in COLOURS]
    texts = [{"completion": f" {colour}"} for colour in COLOURS]
    kinds = {
        "prompts": prompts,
        "conversations": [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts],
        "demonstrations": [{**p, **t} for p, t in zip(prompts, texts, strict=True)],
        "preferences": [
            {**p, "chosen": t["completion"], "rejected": " no"} for p, t in zip(prompts, texts, strict=True)
        ],
        "labels": [{**p, **t, "label": k % 2 == 0} for k, (p, t) in enumerate(zip(prompts, texts, strict=True))],
        "ratings": [
            {**p, **t, "ratings": {"truth": k % 5, "brevity": k % 3}}
            for k, (p, t) in enumerate(zip(prompts, texts, strict=True))
        ],
    }
    for kind, rows in kinds.items():
        (directory / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCORD_CACHE", str(directory / "cache"))
        yield directory


def names_of(place: Path, recipe: str, settings: tuple[str, ...], out: Path) -> set[str]:
    """What one step of a recipe logs."""
    online = is_online(recipe)
    kind = "prompts" if online else view_of(resolve(recipe)).kind
    if any(setting.startswith("environment.") for setting in settings):
        kind = "conversations"
    common = ["batch_size=4", "samples=0", "engine.precision=float32"]
    common += ["steps=1", "sampling.max_new_tokens=24"] if online else ["max_steps=1"]
    words = [
        "train",
        recipe,
        "--model",
        str(place / "model"),
        "--data",
        str(place / f"{kind}.jsonl"),
        "--out",
        str(out),
    ]
    distills = recipe == "distill"
    words += ["--reward", f"{place / 'rewards.py'}:half"] if online and not distills else []
    common += ["advantage.teacher=MODEL"] if distills else []
    for setting in [*common, *settings]:
        words += ["--set", setting.replace("MODEL", str(place / "model")).replace("DIRECTORY", str(place))]
    assert run(words) == 0
    (row,) = read_metrics(out)
    return set(row)


@pytest.fixture(scope="module")
def logged(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The names that every run logs."""
    out = tmp_path_factory.mktemp("runs")
    runs = [(recipe, ()) for recipe in RECIPES] + [(recipe, settings) for recipe, *settings in MORE]
    return {
        " ".join([recipe, *settings]): names_of(place, recipe, tuple(settings), out / str(number))
        for number, (recipe, settings) in enumerate(runs)
    }


def test_every_logged_metric_is_documented(logged: dict[str, set[str]]) -> None:
    known = re.compile("|".join(f"(?:{pattern(name)})" for name in documented()))
    unknown = {
        run: names for run, all_names in logged.items() if (names := {n for n in all_names if not known.fullmatch(n)})
    }
    assert unknown == {}


def test_every_documented_metric_is_logged(logged: dict[str, set[str]]) -> None:
    names = set().union(*logged.values())
    assert [name for name in sorted(documented()) if not any(re.fullmatch(pattern(name), n) for n in names)] == []


def test_every_rule_is_documented_with_its_limits() -> None:
    rows = [cells for heading, cells in tables(PAGE.read_text(encoding="utf-8")) if heading == "Verdicts"]
    assert [(cells[0], cells[1]) for cells in rows] == [(f"`{rule.name}`", rule.when) for rule in RULES]


def test_every_metric_that_a_rule_names_is_documented() -> None:
    named = {name for rule in RULES for name in re.findall(r"`([^`]+)`", rule.when)} - {rule.name for rule in RULES}
    assert [
        name for name in sorted(named) if not any(re.fullmatch(pattern(known), name) for known in documented())
    ] == []
