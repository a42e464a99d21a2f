"""Several data sets in shares: training reads the mixture that `accord data mix` writes, wherever the rows are."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.cli.examples import Examples, settings_of
from accord.data.load import load
from accord.data.mix import MixedRows, mix, mix_records
from accord.data.rows import open_rows
from accord.models.load import load_policy
from accord.models.render import Renderer
from accord.train.examples import StreamedTrees, stream


def write(path: Path, name: str, count: int) -> str:
    rows = [{"prompt": f"{name}{k}", "completion": " " + "xyz"[k % 3] * (k % 5 + 1)} for k in range(count)]
    path = path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(4, 30), st.floats(0.5, 2)), min_size=1, max_size=4), st.integers(0, 9))
def test_memory_and_disk_hold_the_rows_that_the_command_writes(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, float]], seed: int
) -> None:
    """Whichever is named first: `mix` gets the weights in the reverse order."""
    folder = tmp_path_factory.mktemp("mixture")
    weights = {write(folder, name, size): weight for name, (size, weight) in zip("abcd", parts, strict=False)}
    mix(dict(reversed(weights.items())), folder / "mixed.jsonl", seed=seed)
    expected = [json.loads(line)["prompt"] for line in (folder / "mixed.jsonl").read_text().splitlines()]

    records, counts = mix_records({spec: load(spec, "demonstrations").records for spec in weights}, weights, seed)
    assert [record.prompt for record in records] == expected  # type: ignore[union-attr]
    assert list(counts.values()) == [Counter(prompt[0] for prompt in expected)[Path(spec).stem] for spec in counts]
    rows = MixedRows({spec: open_rows(spec, folder / "cache") for spec in weights}, weights, seed)
    assert [rows.read(index)[1]["prompt"] for index in range(len(rows))] == expected  # type: ignore[index]
    assert rows.counts == counts
    assert [str(rows.read(index)[0]) for index in range(3)] == [str(record.source) for record in records[:3]]


def test_a_row_is_drawn_with_all_its_records(tmp_path: Path) -> None:
    """A pair serves KTO as two labels: 4 of its 12 rows are 8 records."""
    pairs = [{"prompt": f"a{k}", "chosen": " good", "rejected": " bad"} for k in range(12)]
    labels = [{"prompt": f"b{k}", "completion": " good", "label": True} for k in range(4)]
    records = {}
    for name, rows in {"a": pairs, "b": labels}.items():
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records[name] = load(str(tmp_path / f"{name}.jsonl"), "labels").records
    drawn, counts = mix_records(records, {"a": 0.5, "b": 0.5}, seed=3)
    assert counts == {"a": 4, "b": 4}
    assert len(drawn) == 12
    of_pairs = [(record.prompt, record.label) for record in drawn if record.prompt[0] == "a"]  # type: ignore[union-attr]
    assert [label for _, label in of_pairs] == [True, False] * 4
    assert len({prompt for prompt, _ in of_pairs}) == 4


def test_other_shares_and_another_seed_are_other_data(tmp_path: Path) -> None:
    parts = {name: open_rows(write(tmp_path, name, 20), tmp_path / "cache") for name in "ab"}
    made = [MixedRows(parts, {"a": weight, "b": 1.0}, seed).hash for weight, seed in [(1, 0), (1, 0), (2, 0), (1, 1)]]
    assert made[0] == made[1]
    assert len(set(made)) == 3


def test_trees_of_a_streamed_mixture(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accord.train.examples.cache_directory", lambda: tmp_path / "cache")
    weights = {write(tmp_path, "a", 9): 0.75, write(tmp_path, "b", 9): 0.25}
    renderer = Renderer(load_policy(str(tiny_llama)))
    records, _ = mix_records({spec: load(spec, "demonstrations").records for spec in weights}, weights, 5)
    expected = [renderer.tree(record).digest() for record in records]
    with closing(stream(weights, "demonstrations", renderer, seed=5)) as trees:
        assert len(trees) == 12
        assert [tree.digest() for tree in trees.batch(range(12))] == expected


@pytest.mark.parametrize("part", ["a", "b"])
def test_a_mixture_streams_where_one_part_is_large(
    part: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 rows of one part and 10 of the other, where data is large from 16: the same trees as in memory."""
    monkeypatch.setattr("accord.train.examples.cache_directory", lambda: tmp_path / "cache")
    named = [f"{write(tmp_path, name, 20 if name == part else 10)}={weight}" for name, weight in [("a", 3), ("b", 1)]]
    renderer = Renderer(load_policy(str(tiny_llama)))
    config = settings_of("sft", named, None, ["seed=2"], lora=False)
    digests, said = [], []
    for limit in (15, 20_000):
        monkeypatch.setattr("accord.data.rows.STREAM_ABOVE", limit)
        trees = Examples(named, config, "demonstrations").trees(renderer)
        streams = isinstance(trees, StreamedTrees)
        assert streams == (limit == 15)
        drawn = trees.batch(range(len(trees))) if isinstance(trees, StreamedTrees) else trees
        digests.append([tree.digest() for tree in drawn])
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert digests[0] == digests[1]
    assert said[0] == said[1]


# The command.


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Of 30 and 12 rows: in shares 2 to 1 they give 24 and 12, and 12 steps are an epoch and a third."""
    folder = tmp_path_factory.mktemp("parts")
    return write(folder, "a", 30), write(folder, "b", 12)


def typed(arguments: Any, out: Path, data: Sequence[str], *more: str) -> list[str]:
    command: list[str] = arguments("sft", out, "--set", "max_steps=12", *more)
    at = command.index("--data")
    return [*command[:at], *(word for one in data for word in ("--data", one)), *command[at + 2 :]]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_on_a_mixture_is_training_on_the_mixed_file(
    commands: Any, arguments: Any, parts: tuple[str, str], tmp_path: Path
) -> None:
    a, b = parts
    mix({a: 2, b: 1}, tmp_path / "mixed.jsonl")
    runs = {name: tmp_path / name for name in ("file", "flags", "toml")}
    toml = tmp_path / "shares.toml"
    toml.write_text(f'[data]\n"{b}" = 1\n"{a}" = 2.0\n')
    for name, data, more in [
        ("file", [str(tmp_path / "mixed.jsonl")], ()),
        ("flags", [f"{a}=2", f"{b}=1"], ()),
        ("toml", [], ("--config", str(toml))),
    ]:
        done = commands.run(typed(arguments, runs[name], data, *more))
        assert done.code == 0, done.output
        if name != "file":
            assert f"Mixture of 36 rows: 24 of {a} (66.7%), 12 of {b} (33.3%)" in done.output
    assert losses(runs["file"]) == losses(runs["flags"]) == losses(runs["toml"])
    assert f'[data]\n"{a}" = 2.0\n"{b}" = 1.0\n' in (runs["flags"] / "config.toml").read_text()
    assert json.loads((runs["flags"] / "provenance.json").read_text())["data"]["name"] == f"{a}=2, {b}=1"

    # Nothing of the run is left to do: what counts is which settings are taken for the same.
    again = commands.run(typed(arguments, runs["flags"], [f"{b}=1", f"{a}=2"], "--resume"))
    assert (again.code, "finished" in again.output) == (0, True), again.output
    other = commands.run(typed(arguments, runs["flags"], [f"{a}=2", f"{b}=0.9"], "--resume"))
    assert other.code == 1
    assert f"data.{b} was 1.0 and is 0.9" in other.output


def test_a_killed_mixture_goes_on_to_the_same_bits(
    commands: Any, arguments: Any, assert_same_run: Any, parts: tuple[str, str], tmp_path: Path
) -> None:
    """A checkpoint stands behind steps 5 and 10; the order in which the parts are named changes on the way."""
    shares = [f"{parts[0]}=2", f"{parts[1]}=1"]
    straight = commands.run(typed(arguments, tmp_path / "straight", shares))
    assert straight.code == 0, straight.output
    out, more = tmp_path / "run", ()
    for step in (3, 7, 11):
        command = typed(arguments, out, shares, *more)
        killed = commands.run(command, metrics=out / "metrics.jsonl", lines=step, signal=signal.SIGKILL)
        assert killed.code in (-signal.SIGKILL, 0), killed.output
        shares.reverse()
        more = ("--resume",)
    finished = commands.run(typed(arguments, out, shares, "--resume"))
    assert finished.code == 0, finished.output
    assert_same_run(out, tmp_path / "straight")


def test_a_plan_takes_the_same_data(commands: Any, tiny_llama: Path, parts: tuple[str, str]) -> None:
    a, b = parts
    done = commands.run(["plan", "sft", "--model", str(tiny_llama), "--data", f"{a}=2", "--data", f"{b}=1"])
    assert done.code == 0, done.output
    assert "Mixture of 36 rows" in done.output
    assert "Steps:" in done.output


@pytest.mark.parametrize(
    ("named", "toml", "message"),
    [
        ("", "", "No data is named.(.|\n)*--data a.jsonl=0.7 --data b.jsonl=0.3"),
        ("<a> <b>", "", "'<a>' has no weight"),
        ("<a>=1 <a>=2", "", "'<a>' is given twice"),
        ("<a>=1 <b>=0", "", "data.<b>: Input should be greater than 0"),
        ("<a>=1 <b>=inf", "", "data.<b>: Input should be a finite number"),
        ("<a>", "[data]\n'<a>' = 1\n", "The settings name data already: <a>"),
        ("<a>=1 <b>=1", "[data]\n'<a>' = 1\n", "The settings name data already: <a>"),
        ("", "[data]\n", "data: Dictionary should have at least 1 item"),
        ("", "[data]\n'<a>' = 'much'\n", "data.<a>: Input should be a valid number"),
        ("<a>=1 <b>=999", "", "<a>: A share of 0.1% of 12 rows is not a single row"),
        ("<a>=1 <b>#alpaca=1", "", "<b>#alpaca: The rows would lose"),
        ("<a>=1 <pairs>=1", "", "<pairs>: 2 of 2 rows cannot be used as demonstrations"),
    ],
)
def test_errors_say_what_is_wrong(
    commands: Any, arguments: Any, parts: tuple[str, str], tmp_path: Path, named: str, toml: str, message: str
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)

    def full(text: str) -> str:
        return text.replace("<a>", parts[0]).replace("<b>", parts[1]).replace("<pairs>", str(pairs))

    file = tmp_path / "settings.toml"
    file.write_text(full(toml))
    done = commands.run(typed(arguments, tmp_path / "run", full(named).split(), "--config", str(file)))
    assert done.code == 1, done.output
    assert re.search(full(message), done.output), done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()
