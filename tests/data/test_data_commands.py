"""`accord data check` and `accord data show` as a person sees them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from accord.cli import run
from accord.cli.check import check
from accord.cli.data import show
from accord.errors import ConfigError, RowError
from accord.models.tiny import save_tiny

PAIR = {"prompt": "Name a bird.", "chosen": "A wren.", "rejected": "A trout.", "margin": 1.5}


def write(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_check_passes_on_good_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(write(tmp_path, PAIR)) == 0
    out = capsys.readouterr().out
    assert "1 rows, 1 PreferencePair" in out
    assert "No problem found." in out


def test_check_fails_with_rule_place_and_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path, PAIR, PAIR | {"chosen": ""})
    assert check(spec) == 1
    out = capsys.readouterr().out
    assert "error empty" in out
    assert f"{spec}:2" in out
    assert "→ Remove the row" in out


def test_a_warning_alone_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(write(tmp_path, PAIR, PAIR)) == 0
    assert "warning duplicate" in capsys.readouterr().out


def test_show_prints_the_first_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    spec = write(tmp_path, PAIR, {"messages": messages}, {"prompt": "not shown"})
    show(spec, rows=2)
    out = capsys.readouterr().out
    for part in (f"{spec}:1", "Name a bird.", "A wren.", "A trout.", "margin: 1.5", "completion, assistant", "Hello"):
        assert part in out
    assert "not shown" not in out


def test_show_prints_what_other_records_carry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requirement = {"kind": "max_words", "count": 3}
    rows = [
        {"id": "r-1", "prompt": "Name a bird.", "requirements": [requirement]},
        {"prompt": "p", "completions": ["x", "y"], "ranks": [2, 1]},
        {"prompt": "p", "completion": "x", "label": False},
    ]
    show(write(tmp_path, *rows))
    out = capsys.readouterr().out
    for part in ("id: r-1", "max_words: {'count': 3}", "completion 1 (rank 1)", "completion 2 (rank 0)", "label: bad"):
        assert part in out


def test_show_uses_the_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path, {"prompt": "p", "completions": ["x", "y"], "ranks": [2, 1]})
    show(spec, kind="preferences")
    assert "Ranking" in capsys.readouterr().out
    with pytest.raises(RowError, match="demonstrations are wanted"):
        show(spec, kind="demonstrations")
    with pytest.raises(ConfigError, match="shows nothing"):
        show(spec, rows=0)


def test_the_data_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(write(tmp_path, {"prompt": "\x1b[2Jcleared \u202e and [bold]markup[/bold]", "completion": "c"}))
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert "\u202e" not in out
    assert r"\x1b[2Jcleared \u202e and [bold]markup[/bold]" in out


def test_the_module_is_light() -> None:
    code = (
        "import sys, accord.cli.check, accord.cli.data;"
        " sys.exit(str({'torch', 'datasets', 'pyarrow', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer has one token per byte and ChatML turns, so every token below is countable by hand."""
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def test_show_marks_the_tokens_that_carry_loss(tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "By"), ("assistant", "Ta")]
    show(write(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]}), model=tiny)
    out = capsys.readouterr().out
    # <|im_start|> user newline Hi <|im_end|> newline, then <|im_start|> assistant newline: 1+4+1+2+1+1 + 1+9+1
    assert "prompt: 21 tokens" in out
    assert "a|s|s|i|s|t|a|n|t|⏎ " in out
    # two answers of two letters and their stop token carry loss; the user's turn between them does not
    assert "6 with loss, stop token trained" in out
    assert "⟦Y|o|<|im_end|>⟧⏎|<|im_start|>|u|s|e|r|⏎|B|y|" in out
    assert "⟦T|a|<|im_end|>⟧" in out


def test_show_says_what_was_cut(tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path, {"prompt": "ab", "chosen": "cdef", "rejected": "g"})
    show(spec, model=tiny, max_tokens=5)
    out = capsys.readouterr().out
    assert "chosen: 3 tokens, 3 with loss, stop token NOT trained, CUT at 5 tokens" in out
    assert "⟦c|d|e⟧" in out
    assert "rejected: 2 tokens, 2 with loss, stop token trained" in out
    assert out.count("CUT") == 1
    with pytest.raises(ConfigError, match="no effect without a model"):
        show(spec, max_tokens=5)


def test_show_prints_prompts_and_labelled_completions_as_tokens(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write(tmp_path, {"prompt": "x" * 50}, {"prompt": "ab", "completion": "é", "label": True})
    show(spec, model=tiny)
    out = capsys.readouterr().out
    assert "prompt: 50 tokens, the last 40" in out
    assert "completion: 3 tokens, 3 with loss, stop token trained" in out  # two bytes and the stop token


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("mix --data {0}=1 --out {1} --rows -5", "--rows"),
        ("mix --data {0}=1 --out {1} --rows 0", "--rows"),
        ("mix --data {0}=1 --out {1} --seed -1", "--seed"),
        ("split --data {2} --out {1}", "{2}: There is no row to read."),
        ("show --data {0} --rows -1", "--rows"),
    ],
)
def test_what_cannot_be_meant_is_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, where: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    data = write(tmp_path, PAIR)
    places = (data, tmp_path / "out.jsonl", tmp_path / "empty.jsonl")
    assert run(["data", *words.format(*places).split()]) == 1
    assert capsys.readouterr().err.startswith(where.format(*places))
