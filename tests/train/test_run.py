"""Settings, recipes, the order of the data, and the rules of a run directory."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from accord.cli import run
from accord.errors import ConfigError, UnknownNameError
from accord.models.tiny import save_tiny
from accord.train import TrainConfig, bind_loss, is_online, recipe, resolve
from accord.train.offline import batch_indices, total_steps

ALL = {path.name.removesuffix(".toml") for path in resources.files("accord.train").joinpath("recipes").iterdir()}
RECIPES = {name for name in ALL if not is_online(name)}
OTHER = {"reward": "bradley_terry", "reward_ratings": "regression", "mpo": "mixture"}
"""Recipes that are not named after their loss."""


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_parse_and_say_what_they_are(name: str) -> None:
    """What a recipe sets of its loss is what the loss gets; a recipe is named after its loss, or listed."""
    config = resolve(name)
    assert config.loss["name"] == OTHER.get(name, name)
    assert TrainConfig.build(recipe(name)) == config
    assert bind_loss(config).config.model_dump(exclude_unset=True) == {
        key: value for key, value in config.loss.items() if key != "name"
    }


def test_later_layers_win(tmp_path: Path) -> None:
    """Recipe, then the file, then --set, then the command's own options."""
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 3\nbatch_size = 5\nseed = 7\n[loss]\nbeta = 0.3\n")
    config = resolve("dpo", file, ["batch_size=6", "seed=8"], {"seed": 9})
    assert (config.epochs, config.batch_size, config.seed) == (3, 6, 9)
    assert config.loss == {"name": "dpo", "beta": 0.3}
    assert config.optimizer.learning_rate == recipe("dpo")["optimizer"]["learning_rate"]


@pytest.mark.parametrize(
    ("assignment", "error", "message"),
    [
        ("loss.name=dpoo", UnknownNameError, "Did you mean 'dpo'"),
        ("loss.betta=0.2", ConfigError, r"\[loss\].*Did you mean 'beta'"),
        ("loss.beta=-1", ConfigError, r"\[loss\].*beta"),
        ("optimizer.learning_rat=1", ConfigError, r"Did you mean 'optimizer\.learning_rate'"),
        ("batch_size=0", ConfigError, "batch_size"),
        ('epochs="many"', ConfigError, "epochs"),
        ("engine.precision=float8", ConfigError, r"engine\.precision"),
        ("loss.name=7", UnknownNameError, "loss"),
    ],
)
def test_settings_that_cannot_be_are_refused(assignment: str, error: type[ConfigError], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve("dpo", assignments=[assignment])


def test_a_loss_of_rollouts_learns_from_no_file() -> None:
    with pytest.raises(ConfigError, match=r"loss\.name: .*'ppo_clip' learns from completions that the policy samples"):
        resolve("sft", assignments=["loss.name=ppo_clip"])


def test_an_unknown_recipe_lists_those_that_there_are() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown recipe 'dpoo'\. Did you mean 'dpo'\? Known: .*reward, .*sft"):
        resolve("dpoo")


def test_an_epoch_holds_every_row_once_in_its_own_order() -> None:
    """10 rows in batches of 4: 3 steps per epoch, the last with 2 rows."""
    config = resolve("sft", assignments=["batch_size=4", "epochs=3", "seed=5"])
    assert total_steps(10, config) == 9
    epochs = [[batch_indices(step, 10, config) for step in range(start, start + 3)] for start in (0, 3, 6)]
    assert all([len(batch) for batch in epoch] == [4, 4, 2] for epoch in epochs)
    assert all(Counter(chain(*epoch)) == Counter(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(4, 10, config) == epochs[1][1]
    other = resolve("sft", assignments=["batch_size=4", "epochs=3", "seed=6"])
    assert [batch_indices(step, 10, other) for step in range(3)] != epochs[0]


@pytest.mark.parametrize(("maximum", "steps"), [("", 9), ("max_steps=2", 2), ("max_steps=100", 9)])
def test_max_steps_ends_a_run_early_never_late(maximum: str, steps: int) -> None:
    config = resolve("sft", assignments=["batch_size=4", "epochs=3", *([maximum] if maximum else [])])
    assert total_steps(10, config) == steps


@pytest.fixture
def attempt(arguments: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`attempt("sft", out, …)`: exit code and message of a short run in this process."""
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))

    def call(kind: str, out: Path, *more: str, **sources: Path) -> tuple[int, str]:
        capsys.readouterr()
        code = run(arguments(kind, out, "--set", "max_steps=1", *more, **sources))
        captured = capsys.readouterr()
        return code, captured.err + captured.out

    return call


@pytest.fixture
def started(attempt: Any, tmp_path: Path) -> Path:
    """A run of one step whose model was taken away: an unfinished run."""
    out = tmp_path / "run"
    code, message = attempt("sft", out)
    assert code == 0, message
    shutil.rmtree(out / "model")
    return out


def test_a_run_directory_is_not_used_twice(attempt: Any, started: Path) -> None:
    before = (started / "metrics.jsonl").read_bytes()
    code, message = attempt("sft", started)
    assert (code, "already holds a run" in message, "--resume" in message) == (1, True, True)
    assert (started / "metrics.jsonl").read_bytes() == before


def test_a_directory_with_other_things_is_not_touched(attempt: Any, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"")
    code, message = attempt("sft", out)
    assert (code, "not empty and holds no run" in message) == (1, True)
    assert [path.name for path in out.iterdir()] == ["cat.jpg"]


def test_a_finished_run_says_so(attempt: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    attempt("sft", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    code, message = attempt("sft", out, "--resume")
    assert (code, "finished" in message) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_settings_are_refused(attempt: Any, started: Path) -> None:
    code, message = attempt("sft", started, "--resume", "--set", "optimizer.learning_rate=0.5")
    expected = "settings have changed: optimizer.learning_rate was 0.003 and is 0.5"
    assert (code, expected in message) == (1, True), message
    code, message = attempt("sft", started, "--resume", "--lora")
    assert (code, "settings have changed" in message) == (1, True), message


def test_other_data_is_refused(attempt: Any, started: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """The same file name with one letter changed, and a row less."""
    rows = data["sft"].read_text().splitlines()
    changed = json.loads(rows[3])
    changed["completion"] += "!"
    for name, lines in {"changed": [*rows[:3], json.dumps(changed), *rows[4:]], "shorter": rows[:-1]}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        code, message = attempt("sft", started, "--resume", rows=file)
        assert (code, "The data has changed" in message) == (1, True), message


def test_data_and_model_may_have_moved(
    attempt: Any, started: Path, data: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """What they are counts, not what they are called."""
    shutil.copy(data["sft"], tmp_path / "moved.jsonl")
    shutil.copytree(tiny_llama, tmp_path / "elsewhere")
    code, message = attempt("sft", started, "--resume", rows=tmp_path / "moved.jsonl", model=tmp_path / "elsewhere")
    assert code == 0, message


def test_a_taken_directory_is_refused_before_anything_is_read(attempt: Any, started: Path, tmp_path: Path) -> None:
    code, message = attempt("sft", started, rows=tmp_path / "nowhere.jsonl")
    assert (code, "already holds a run" in message) == (1, True), message


def test_rows_that_are_skipped_are_all_listed(attempt: Any, tmp_path: Path) -> None:
    """More than a message names; the file that takes the run's place is refused."""
    rows = [{"prompt": f"p{k}", "completion": " c" if k % 2 else " "} for k in range(16)]
    data, out = tmp_path / "half.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, message = attempt("sft", out, "--skip-bad", rows=data)
    assert (code, f"8 rows could not be used and were left out: {out / 'skipped.jsonl'}" in message) == (0, True), (
        message
    )
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [row["source"] for row in listed] == [f"{data}:{line}" for line in range(1, 17, 2)]
    assert {(row["rule"], row["what"]) for row in listed} == {("empty", "The completion is empty.")}
    code, message = attempt("sft", data, rows=data)
    assert (code, "This is a file, not a directory." in message) == (1, True), message


def test_another_model_is_refused(attempt: Any, started: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    code, message = attempt("sft", started, "--resume", model=other)
    assert (code, "The model has changed" in message) == (1, True), message


def test_another_chat_template_is_refused(attempt: Any, tmp_path: Path) -> None:
    """The setting stays the same (the path of a file); what stands in the file does not."""
    template, out = tmp_path / "chat.jinja", tmp_path / "run"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    setting = ("--set", f'chat_template="{template}"')
    code, message = attempt("sft", out, *setting)
    assert code == 0, message
    shutil.rmtree(out / "model")
    template.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    code, message = attempt("sft", out, "--resume", *setting)
    assert (code, "The template has changed" in message) == (1, True), message


@pytest.mark.parametrize("file", ["provenance.json", "config.toml"])
@pytest.mark.parametrize("damage", [None, b"{", b"{}", b"\xff"])
def test_a_damaged_run_directory_is_one_message(attempt: Any, started: Path, file: str, damage: bytes | None) -> None:
    (started / file).unlink()
    if damage is not None:
        (started / file).write_bytes(damage)
    code, message = attempt("sft", started, "--resume")
    if (file, damage) == ("provenance.json", None):
        assert code == 0, "a run without provenance was stopped before it began"
    else:
        assert (code, str(started) in message) == (1, True), message


def test_a_missing_chat_template_file_is_one_message(attempt: Any, tmp_path: Path) -> None:
    code, message = attempt("sft", tmp_path / "run", "--set", 'chat_template="/nowhere.jinja"')
    assert (code, "/nowhere.jinja" in message) == (1, True)
    assert not (tmp_path / "run").exists()


def test_provenance_says_where_the_numbers_come_from(started: Path, tiny_llama: Path, data: dict[str, Path]) -> None:
    facts = json.loads((started / "provenance.json").read_text())
    assert facts["data"]["name"] == str(data["sft"])
    assert facts["data"]["rows"] == 24
    assert facts["model"]["name"] == str(tiny_llama)
    assert {"accord", "code", "python", "torch", "transformers"} <= facts["versions"].keys()
