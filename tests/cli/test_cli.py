"""The command line from outside: real processes, and verbs of our own making in place of the real ones."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shlex
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from accord.cli import VERBS, build_app, run
from accord.errors import EmptyDataError

HEAVY = ["datasets", "numpy", "pydantic", "torch", "transformers"]


def accord(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in a process of its own."""
    command = [sys.executable, "-m", "accord", *arguments]
    env = {**os.environ, "COLUMNS": "120", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)


@pytest.fixture
def verb(tmp_path, monkeypatch):
    """Make `accord doctor` run the given body of a function instead, in this process: `verb("return 3")()`."""

    def make(body: str):
        name = f"verb_{tmp_path.name}"
        text = "import errno, os\nfrom accord.errors import *\n\ndef act(*, number: int = 0):\n    " + body
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        rows = tuple(row._replace(function=f"{name}:act") if row.name == "doctor" else row for row in VERBS)
        monkeypatch.setattr("accord.cli.VERBS", rows)
        return lambda *arguments: run(["doctor", *arguments])

    return make


def test_help_lists_every_verb_in_the_order_of_the_loop():
    shown = accord("--help")
    assert shown.returncode == 0
    places = [
        shown.stdout.index(f"│ {name} ") for name in ["quickstart", "data", "train", "sample", "evaluate", "chat"]
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["--version"], ["trian"], ["data", "chekc"], []]
)
def test_nothing_heavy_is_imported_to_answer(arguments):
    script = (
        "import sys\nfrom accord.cli import run\n"
        f"try:\n    run({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "HEAVY []"


def test_every_verb_is_reachable_and_help_ends_with_an_example_that_calls_it():
    for verb in VERBS:
        assert f"accord {verb.name}" in verb.example
        node = build_app()
        for word in verb.name.split():
            assert word in node
            node = node._get_item(word)
        assert node.help == verb.summary


def test_what_is_installed_as_accord_is_main():
    (point,) = entry_points(group="console_scripts", name="accord")
    assert point.value == "accord.cli:main"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Unknown command 'trian'. Did you mean 'train'?"),
        (["data", "chekc"], "Unknown command 'chekc'. Did you mean 'check'?"),
        (["doctor", "--qick"], "--qick"),
    ],
)
def test_a_command_that_cannot_be_read_exits_with_2(arguments, message):
    ran = accord(*arguments)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "--help" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not ran.stdout


def test_a_value_of_the_wrong_type_is_a_usage_error(verb, capsys):
    assert verb("return 0")("--number", "many") == 2
    assert "many" in capsys.readouterr().err


@pytest.mark.parametrize(("body", "code"), [("return 3", 3), ("return None", 0), ("return 0", 0)])
def test_a_verb_returns_its_exit_code(verb, body, code):
    assert verb(body)() == code


def test_an_accord_error_is_its_message_and_exit_1(verb, capsys):
    code = verb("raise RowError('Chosen equals [rejected].', where='pairs.jsonl:17', fix='Delete the row.')")()
    printed = capsys.readouterr()
    assert code == 1
    assert printed.err == "pairs.jsonl:17: Chosen equals [rejected].\n  → Delete the row.\n"
    assert not printed.out


def test_a_full_disk_is_a_message_wherever_it_comes_up(verb, capsys):
    assert verb("raise OSError(errno.ENOSPC, 'No space left on device')")() == 1
    assert "The disk is full" in capsys.readouterr().err


def test_other_errors_are_bugs_and_keep_their_traceback(verb):
    with pytest.raises(ZeroDivisionError):
        verb("return 1 // 0")()


def test_the_traceback_is_shown_on_request(verb, monkeypatch):
    monkeypatch.setenv("ACCORD_DEBUG", "1")
    with pytest.raises(EmptyDataError, match="No rows"):
        verb("raise EmptyDataError('No rows.')")()


def test_ctrl_c_says_so_in_one_line(verb, capsys):
    assert verb("raise KeyboardInterrupt")() == 130
    assert capsys.readouterr().err == "Stopped.\n"


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["--out", "my runs/x"], "accord train dpo --out 'my runs/x' --resume"),
        (["--out", "x", "--resume"], "accord train dpo --out x --resume"),
    ],
)
def test_ctrl_c_in_a_run_says_what_to_type_to_go_on(tmp_path, typed, line):
    """A real SIGINT to a real process, in a verb that can resume."""
    (tmp_path / "slow_verb.py").write_text(
        "import signal\n\ndef act(recipe: str, *, out: str, resume: bool = False):\n"
        "    print('running', flush=True)\n    signal.pause()\n"
    )
    script = (
        "import signal, sys, accord.cli as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored\n"
        "cli.VERBS = tuple(v._replace(function='slow_verb:act') if v.name == 'train' else v for v in cli.VERBS)\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script, "train", "dpo", *typed]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == f"Stopped. To go on, type: {line}\n"


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path):
    """`accord data show | head`: the pipe closes while the verb still prints."""
    (tmp_path / "long_verb.py").write_text("def act():\n    for _ in range(100_000):\n        print('line')\n")
    script = (
        "import sys, accord.cli as cli\n"
        "cli.VERBS = tuple(v._replace(function='long_verb:act') if v.name == 'doctor' else v for v in cli.VERBS)\n"
        "sys.exit(cli.run(['doctor']))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_commands_that_resume_are_those_that_make_a_run():
    assert {verb.name for verb in VERBS if verb.resumes} == {"quickstart", "train"}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_example_of_a_verb_can_be_typed(verb):
    """Each flag of the example is one that the verb knows, and nothing that it needs is left out."""
    if importlib.util.find_spec(verb.function.partition(":")[0]) is None:
        pytest.skip("this verb has no module yet")
    words = shlex.split(verb.example)
    command, bound, _ = build_app().parse_args(words[1:], exit_on_error=False, print_error=False)
    assert f"{command.__module__}:{command.__name__}" == verb.function
    assert words == ["accord", *verb.name.split()] or bound.arguments
    assert not verb.resumes or "resume" in inspect.signature(command).parameters
