"""samples.html: what the model says before and after training, whatever happens in between."""

from __future__ import annotations

import json
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from accord.cli import run
from accord.data.load import load
from accord.engine.engine import Engine, EngineConfig
from accord.models.load import load_policy, load_reward_model
from accord.models.render import Renderer
from accord.train import Run
from accord.train.examples import stream
from accord.train.samples import SamplePage

EXACT = ("--set", "samples=3", "--set", "engine.precision=float32")


class Page(HTMLParser):
    """Articles of the page: the prompt, and texts by heading."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.articles: list[tuple[str, dict[str, str]]] = []
        self._parts: list[str] = []
        self.feed(path.read_bytes().decode())

    def handle_starttag(self, tag: str, _: Any) -> None:
        if tag in ("pre", "h2"):
            self._text = ""
        elif tag == "article":
            self._parts = []

    def handle_data(self, data: str) -> None:
        self._text = getattr(self, "_text", "") + data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("pre", "h2"):
            self._parts.append(self._text)
        elif tag == "article":
            prompt, *texts = self._parts
            self.articles.append((prompt, dict(zip(texts[::2], texts[1::2], strict=True))))


def greedy(directory: Path, prompt: str) -> str:
    """By transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(ids, do_sample=False, max_new_tokens=64)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("kind", "heading"), [("sft", "Demonstration"), ("dpo", "Chosen")])
@pytest.mark.usefixtures("cache")
def test_texts_are_those_that_transformers_generates(
    kind: str, heading: str, arguments: Any, data: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    assert run(arguments(kind, tmp_path / "run", *EXACT)) == 0
    answers = {
        row["prompt"]: row.get("chosen", row.get("completion"))
        for row in map(json.loads, data[kind].read_text().splitlines())
    }
    articles = Page(tmp_path / "run" / "samples.html").articles
    assert len(articles) == 3
    for prompt, texts in articles:
        assert list(texts) == [heading, "Before", "After"]
        assert texts[heading] == answers[prompt]
        assert texts["Before"] == greedy(tiny_llama, prompt)
        assert texts["After"] == greedy(tmp_path / "run" / "model", prompt)
    assert any(texts["Before"] != texts["After"] for _, texts in articles)


@pytest.mark.usefixtures("cache")
def test_a_reward_model_shows_its_scores(arguments: Any, data: dict[str, Path], tmp_path: Path) -> None:
    """Before training the head is zero; afterwards the scores are those of the model that was written."""
    assert run(arguments("reward", tmp_path / "run", *EXACT)) == 0
    model = load_reward_model(str(tmp_path / "run" / "model"))
    trees = [Renderer(model).tree(record) for record in load(str(data["reward"]), "preferences").records]
    scores = {}
    for tree, row in zip(trees, Engine(model, EngineConfig(precision="float32")).forward(trees), strict=True):
        for branch, score in zip(tree.branches, row, strict=True):
            text = model.tokenizer.decode(branch.tokens_L, skip_special_tokens=True)
            scores[model.tokenizer.decode(tree.prompt_P), text] = f"score 0.00 → {score[0]:.2f}"
    articles = Page(tmp_path / "run" / "samples.html").articles
    assert len(articles) == 3
    for prompt, texts in articles:
        assert [heading.split(" · ")[0] for heading in texts] == ["Chosen", "Rejected"]
        assert [heading.split(" · ")[1] for heading in texts] == [scores[prompt, text] for text in texts.values()]


@pytest.mark.usefixtures("cache")
def test_thumbs_stand_beside(tiny_llama: Path, tmp_path: Path) -> None:
    """Of a prompt with both, the good one is shown."""
    rows = [("Sky?", " blue", True), ("Sky?", " no", False), ("Sun?", " no", False)]
    path = tmp_path / "labels.jsonl"
    path.write_text(
        "".join(json.dumps(dict(zip(("prompt", "completion", "label"), r, strict=True))) + "\n" for r in rows)
    )
    command = ["train", "kto", "--model", str(tiny_llama), "--data", str(path), "--out", str(tmp_path / "run")]
    assert run(command) == 0
    found = {prompt: next(iter(texts.items())) for prompt, texts in Page(tmp_path / "run" / "samples.html").articles}
    assert found == {"Sky?": ("Thumb up", " blue"), "Sun?": ("Thumb down", " no")}


@pytest.mark.parametrize("more", [(), ("--lora",)], ids=["all weights", "LoRA"])
def test_a_kill_changes_no_sample_and_samples_change_no_bit(
    more: tuple[str, ...], commands: Any, arguments: Any, straight: Any, assert_same_run: Any, tmp_path: Path
) -> None:
    """Killed behind step 7, and while the trained model is sampled or written. Weights and metrics are those of a run
    without samples; the page is that of a run without a kill."""
    samples, out = ("--set", "samples=2"), tmp_path / "run"
    for lines, resume in ((7, ()), (12, ("--resume",))):
        options = {"metrics": out / "metrics.jsonl", "lines": lines, "signal": signal.SIGKILL}
        killed = commands.run(arguments("sft", out, *more, *samples, *resume), **options)
        assert killed.code in (-signal.SIGKILL, 0), killed.output
        if lines == 7:
            articles = Page(out / "samples.html").articles
            assert [list(texts) for _, texts in articles] == [["Demonstration", "Before"]] * 2
            assert "not finished" in (out / "samples.html").read_text()
    assert commands.run(arguments("sft", out, *more, *samples, "--resume")).code == 0
    assert_same_run(out, straight("sft", *more), "samples.html")
    assert (out / "samples.html").read_bytes() == (straight("sft", *more, *samples) / "samples.html").read_bytes()


@pytest.mark.usefixtures("cache")
def test_streamed_rows_are_sampled_and_faulty_ones_left_to_training(tiny_llama: Path, tmp_path: Path) -> None:
    good = [json.dumps({"prompt": f"Say {n}:", "completion": f" {n}"}) for n in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good[0], '{"prompt": "Say", "completion": ""}', *good[1:]]) + "\n")
    policy = load_policy(str(tiny_llama))
    trees = stream(str(path), "demonstrations", Renderer(policy))
    SamplePage(Engine(policy, EngineConfig()), trees, Run(tmp_path), count=4, seed=0)
    trees.close()
    assert sorted(prompt for prompt, _ in Page(tmp_path / "samples.html").articles) == ["Say 0:", "Say 1:", "Say 2:"]


@pytest.mark.usefixtures("cache")
def test_trackers_are_checked_before_anything_is_computed(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("accord.tracking.trackers.find_spec", lambda _: None)
    assert run(arguments("sft", tmp_path / "run", "--set", 'trackers=["wandb"]')) == 1
    message = capsys.readouterr()
    assert "pip install wandb" in message.err
    assert "records from" not in message.out
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("cache")
def test_a_run_is_told_to_tensorboard(arguments: Any, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(arguments("sft", tmp_path / "run", "--set", 'trackers=["tensorboard"]', "--set", "max_steps=2")) == 0
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [1, 2]
    assert sorted(events.Tags()["scalars"]) == sorted(rows[0])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
