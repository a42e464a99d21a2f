"""Data that streams: the same training as in memory, tokens kept, faults shown where they are, memory flat."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord.data.load import load
from accord.data.rows import STREAM_ABOVE
from accord.errors import RowError
from accord.models.load import load_policy
from accord.models.render import Renderer
from accord.models.tiny import tiny_tokenizer
from accord.train import Run, provenance, resolve, train
from accord.train.examples import TokenCache, batches, render, stream


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fit(tiny_llama: Path, data: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Any]]:
    """Train on a kind of data, from memory or streamed; returns the weights and the trees."""

    def run(name: str, kind: Any, recipe: str, *settings: str, streamed: bool) -> tuple[dict[str, Any], Any]:
        config = resolve(recipe, assignments=["batch_size=5", "epochs=2", "optimizer.learning_rate=0.01", *settings])
        network = load_policy(str(tiny_llama))
        renderer = Renderer(network)
        spec = str(data[recipe])
        trees: Any = stream(spec, kind, renderer) if streamed else render(renderer, load(spec, kind).records)
        facts = provenance(network, "tiny", spec, trees, config.seed)
        train(network, trees, config, Run.open(tmp_path / name, config, facts, resume=False), stage="Test")
        return network.model.state_dict(), trees

    return run


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_streamed_demonstrations_train_to_the_same_bits(fit: Any) -> None:
    expected, _ = fit("memory", "demonstrations", "sft", streamed=False)
    first, trees = fit("first", "demonstrations", "sft", streamed=True)
    assert_same(first, expected)
    assert trees.rendered == len(trees) == 24  # two epochs
    second, again = fit("second", "demonstrations", "sft", streamed=True)
    assert_same(second, expected)
    assert again.rendered == 0


@pytest.mark.parametrize("adapter", [(), ("lora.rank=4",)], ids=["all weights", "LoRA"])
def test_streamed_preferences_meet_the_same_reference(adapter: tuple[str, ...], fit: Any) -> None:
    """References of equal batches are equal; of other batches, to rounding."""
    expected, _ = fit("memory", "preferences", "dpo", *adapter, streamed=False)
    cached, _ = fit("cached", "preferences", "dpo", *adapter, streamed=True)
    assert_same(cached, expected)


def test_a_lora_reference_is_computed_as_training_goes(
    fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lazy, _ = fit("lazy", "preferences", "dpo", "lora.rank=4", streamed=True)
    said = capsys.readouterr()
    assert "Reference" not in said.err
    (tmp_path / "cache" / "reference.sqlite").unlink()
    ahead, _ = fit("ahead", "preferences", "dpo", "lora.rank=4", streamed=False)
    for name in lazy:
        np.testing.assert_allclose(lazy[name], ahead[name], atol=1e-4)


def test_a_reference_of_all_weights_is_computed_first_and_says_what_else_there_is(
    fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps of 5 rows need the reference of 15 rows only."""
    fit("first", "preferences", "dpo", "max_steps=3", streamed=True)
    said = capsys.readouterr()
    assert "--lora" in said.out
    assert "15 rows" in said.out
    assert "15/15" in said.err


@pytest.fixture
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer(load_policy(str(tiny_llama)))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def demonstrations(count: int) -> list[Any]:
    return [{"prompt": f"Say {n}:", "completion": f" {n}"} for n in range(count)]


def test_a_batch_does_not_depend_on_what_was_cached_or_on_the_order(renderer: Renderer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", demonstrations(9))
    expected = render(renderer, load(str(path), "demonstrations").records)
    for order in ([3, 1], [0, 1, 2, 3, 8], [8, 0, 3]):
        with closing(stream(str(path), "demonstrations", renderer)) as trees:
            for index, tree in zip(order, trees.batch(order), strict=True):
                assert tree.digest() == expected[index].digest()
                assert tree.source == expected[index].source
                assert (tree.ranks, tree.margin, tree.labels) == ((0,), 0.0, ())


def test_another_tokenizer_template_or_limit_misses_the_cache(tiny_llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", demonstrations(3))
    network = load_policy(str(tiny_llama))

    def rendered(max_tokens: int | None = None) -> int:
        with closing(stream(str(path), "demonstrations", Renderer(network, max_tokens))) as trees:
            trees.batch([0, 1, 2])
            return trees.rendered

    assert [rendered(), rendered(), rendered(50), rendered(50)] == [3, 0, 3, 0]
    network.tokenizer.chat_template = "other"
    assert rendered() == 3
    network.tokenizer = tiny_tokenizer()
    network.tokenizer.add_tokens(["Say"])
    assert rendered() == 3
    path.write_text(path.read_text().replace("Say 1", "Say one"))
    assert rendered() == 3


def test_a_fault_stops_at_its_own_step_with_its_place(renderer: Renderer, tmp_path: Path) -> None:
    rows = demonstrations(8)
    rows[5] = {"prompt": "Say nothing:", "completion": " "}
    path = write(tmp_path / "a.jsonl", rows)
    with closing(stream(str(path), "demonstrations", renderer)) as trees:
        feed = batches(trees, [[0, 1], [2, 3], [4, 5], [6, 7]])
        assert [len(next(feed)), len(next(feed))] == [2, 2]
        with pytest.raises(RowError, match=r"a\.jsonl:6: The completion is empty(.|\n)*--resume --skip-bad"):
            next(feed)


@pytest.mark.parametrize(
    ("row", "rule"),
    [("{", "json"), ({"nothing": 1}, "schema"), ({"prompt": "a", "completion": ""}, "empty"),
     ({"prompt": "x" * 600, "completion": "y"}, "render"), ({"prompt": "a", "chosen": "b", "rejected": "c"}, "kind")],
)  # fmt: skip
def test_skipped_rows_are_listed_once(row: Any, rule: str, renderer: Renderer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*demonstrations(2), row, *demonstrations(1)])
    listing = tmp_path / "skipped.jsonl"
    for _ in range(2):
        with closing(stream(str(path), "demonstrations", renderer, listing)) as trees:
            assert [tree.source.line for tree in trees.batch([0, 2, 3]) if tree.source] == [1, 4]
            assert trees.batch([2]) == []
            assert trees.skipped == 1
    (listed,) = map(json.loads, listing.read_text().splitlines())
    assert (listed["row"], listed["source"], listed["rule"]) == (2, f"{path}:3", rule)


def test_cut_completions_are_counted_once(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [*demonstrations(3), {"prompt": "Say", "completion": " much" * 20}]
    path = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        with closing(stream(str(path), "demonstrations", Renderer(load_policy(str(tiny_llama)), 30))) as trees:
            trees.batch([0, 3])
            trees.batch([3])
            assert trees.truncated == 1


def test_a_damaged_cache_costs_time_only(renderer: Renderer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", demonstrations(2))
    with closing(stream(str(path), "demonstrations", renderer)) as trees:
        expected = [tree.digest() for tree in trees.batch([0, 1])]
    (file,) = (tmp_path / "cache" / "tokens").glob("*/trees.sqlite")
    file.write_bytes(b"not a database" * 500)
    with closing(stream(str(path), "demonstrations", renderer)) as trees:
        assert [tree.digest() for tree in trees.batch([0, 1])] == expected
        assert trees.rendered == 2


def test_the_oldest_token_cache_goes_when_all_take_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(["old", "new"]):
        directory = tmp_path / name
        with closing(TokenCache(directory, [])):
            (directory / "ballast").write_bytes(bytes(30_000))
        os.utime(directory, (age, age))
    monkeypatch.setattr("accord.train.examples._CACHE_LIMIT", 45_000)
    with closing(TokenCache(tmp_path / "mine", [])):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new"]


# The command, on data that is large enough to stream.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("large") / "large.jsonl", demonstrations(STREAM_ABOVE + 30))


def test_a_killed_run_on_streamed_data_goes_on_to_the_same_bits(
    commands: Any, arguments: Any, assert_same_run: Any, large: Path, tmp_path: Path
) -> None:
    more = ("--set", "max_steps=12")
    straight = commands.run(arguments("sft", tmp_path / "straight", *more, rows=large))
    assert straight.code == 0, straight.output
    assert "read from disk" in straight.output
    out = tmp_path / "run"
    killed = commands.run(
        arguments("sft", out, *more, rows=large), metrics=out / "metrics.jsonl", lines=7, signal=signal.SIGKILL
    )
    assert killed.code in (-signal.SIGKILL, 0), killed.output
    finished = commands.run(arguments("sft", out, *more, "--resume", rows=large))
    assert finished.code == 0, finished.output
    assert_same_run(out, tmp_path / "straight")


def test_a_fault_in_the_middle_keeps_what_was_trained_and_skip_bad_goes_on(
    commands: Any, arguments: Any, large: Path, tmp_path: Path
) -> None:
    """The faulty row is the first in the order that was not checked at the start. Step 6 has it."""
    lines = large.read_text().splitlines()
    order = np.random.default_rng([0, 0]).permutation(len(lines))
    position = int(np.argmax(order > STREAM_ABOVE))
    faulty = int(order[position])
    lines[faulty] = "{}"
    data = write(tmp_path / "faulty.jsonl", list(lines))
    batch = position // 5
    assert position // batch == 5
    out, more = tmp_path / "run", ("--set", "max_steps=8", "--set", f"batch_size={batch}")
    stopped = commands.run(arguments("sft", out, *more, rows=data))
    assert stopped.code == 1, stopped.output
    assert f"faulty.jsonl:{faulty + 1}: " in stopped.output
    assert "--resume --skip-bad" in stopped.output
    assert (out / "metrics.jsonl").read_text().count("\n") == 5
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["5"]
    finished = commands.run(arguments("sft", out, *more, "--resume", "--skip-bad", rows=data))
    assert finished.code == 0, finished.output
    assert "1 rows could not be used" in finished.output
    (skipped,) = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert skipped["row"] == faulty
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_memory_does_not_grow_with_the_rows_that_were_used(renderer: Renderer, tmp_path: Path) -> None:
    """50,000 rows of 1.5 kB: the text of the 5,000 between the two marks would take 7 MB, their trees as much again."""
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc")
    row = json.dumps({"prompt": "Say it:", "completion": " word", "note": "x" * 1400})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{row}\n" * 50_000)
    with closing(stream(str(path), "demonstrations", renderer)) as trees:
        order = np.random.default_rng(0).permutation(len(trees))[:6000].reshape(-1, 50).tolist()
        used = []
        for step, _ in enumerate(batches(trees, order)):
            if step in (20, 119):
                gc.collect()
                used.append(int(status.read_text().split()[1]) * resource.getpagesize() / 2**20)
        assert trees.rendered == 6000
    assert used[1] - used[0] < 5
