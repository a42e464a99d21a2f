"""The command line `accord`: the verbs, and the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 an AccordError (its message on stderr), 2 a command that cannot be read, 130 stopped by Ctrl-C.
Verbs are imported when they run, so `accord --help` does not wait for torch. ACCORD_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cyclopts import App, CycloptsError, UnknownCommandError

from accord import __version__
from accord.errors import AccordError, unknown_name
from accord.files import disk_error

__all__ = ["VERBS", "Verb", "build_app", "main", "run"]


class Verb(NamedTuple):
    """One command: `name` as typed after `accord`, the function that does it, and its help.

    `resumes`: takes `--resume`.
    """

    name: str
    function: str
    summary: str
    example: str
    resumes: bool = False


_MODEL_DATA = "--model starter --data pairs.jsonl"

VERBS = (
    Verb("quickstart", "accord.cli.quickstart:quickstart", "The whole loop in small: sample, judge, train, report.",
         "accord quickstart --seed 1", resumes=True),
    Verb("data check", "accord.cli.check:check", "Find every fault in a data set before training does.",
         "accord data check --data pairs.jsonl"),
    Verb("data show", "accord.cli.data:show", "Show the records as training will see them.",
         "accord data show --data pairs.jsonl"),
    Verb("data convert", "accord.cli.prepare:convert", "Write data of any format in Accord's own columns.",
         "accord data convert --data owner/name:train --out pairs.jsonl --to preferences"),
    Verb("data split", "accord.cli.prepare:split", "Divide data into train and test without a common conversation.",
         "accord data split --data pairs.jsonl --out parts --test 0.1"),
    Verb("data mix", "accord.cli.prepare:mix", "Draw from several data sets in given shares.",
         "accord data mix --data a.jsonl=0.7 --data b.jsonl=0.3 --out mixed.jsonl"),
    Verb("data dedup", "accord.cli.prepare:dedup", "Remove repeated rows, also near repetitions.",
         "accord data dedup --data pairs.jsonl --out unique.jsonl --near 0.8"),
    Verb("plan", "accord.cli.plan:plan", "What a training run will cost in memory and time, and what to change.",
         f"accord plan dpo {_MODEL_DATA}"),
    Verb("train", "accord.cli.train:train", "Train a model by a recipe: sft, reward, dpo, ppo, grpo and their kin.",
         f"accord train dpo {_MODEL_DATA} --out runs/dpo --set loss.beta=0.2", resumes=True),
    Verb("sample", "accord.cli.sample:sample", "Sample completions for a file of prompts.",
         "accord sample --model runs/dpo/model --data prompts.jsonl --out completions.jsonl"),
    Verb("sample-server", "accord.cli.sample_server:sample_server", "Serve a model's samples to other processes.",
         "accord sample-server --model starter --port 8001"),
    Verb("evaluate compare", "accord.cli.evaluate:compare", "Compare a model with a baseline, paired by prompt.",
         "accord evaluate compare --model runs/dpo/model --data prompts.jsonl --out runs/compare"),
    Verb("evaluate reward", "accord.cli.evaluate:reward", "Measure a reward model's accuracy on held-out preferences.",
         "accord evaluate reward --model runs/reward/model --data pairs.jsonl --out runs/accuracy"),
    Verb("chat", "accord.cli.chat:chat", "Talk to a model in the terminal.",
         "accord chat --model runs/dpo/model"),
    Verb("doctor", "accord.cli.doctor:doctor", "Check this machine: what is missing, and the command that mends it.",
         "accord doctor"),
)  # fmt: skip

_GROUPS = {
    "data": "Check, inspect and prepare data sets.",
    "evaluate": "Measure a model.",
}


def build_app() -> App:
    """The command tree; no verb is imported until it is called or its own help is asked for."""
    app = App(
        name="accord",
        help="Aligns a language model with what people want, and keeps it aligned.",
        help_epilogue="Start with: accord quickstart\n",
        version=__version__,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    groups = {"": app}
    for order, verb in enumerate(VERBS):
        group, _, name = verb.name.rpartition(" ")
        if group not in groups:
            groups[group] = App(name=group, help=_GROUPS[group], help_epilogue="", sort_key=order)
            app.command(groups[group])
        example = f"Example: {verb.example}\n"
        groups[group].command(verb.function, name=name, help=verb.summary, help_epilogue=example, sort_key=order)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every error of the user's becomes one message on stderr."""
    if os.environ.get("ACCORD_DEBUG") == "1":
        return _call(arguments)
    try:
        return _call(arguments)
    except CycloptsError as error:
        return _fail(_usage(error), code=2)
    except AccordError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _stopped(arguments)
    except BrokenPipeError:
        # The reader of our output left (`accord data show | head`): close quietly, as other commands do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        explained = disk_error(error, Path(error.filename or "."))
        if explained is None:
            raise
        return _fail(str(explained))


def main() -> None:
    """Entry point of the command `accord`."""
    sys.exit(run(sys.argv[1:]))


def _call(arguments: Sequence[str]) -> int:
    code = build_app()(list(arguments), exit_on_error=False, print_error=False)
    sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _verb(arguments: Sequence[str]) -> Verb | None:
    typed = " ".join(arguments[:2])
    return next((verb for verb in VERBS if f"{typed} ".startswith(f"{verb.name} ")), None)


def _stopped(arguments: Sequence[str]) -> int:
    verb = _verb(arguments)
    if verb and verb.resumes:
        again = [*arguments] if "--resume" in arguments else [*arguments, "--resume"]
        _print_error(f"Stopped. To go on, type: {shlex.join(['accord', *again])}", "yellow")
    else:
        _print_error("Stopped.", "yellow")
    return 130


def _usage(error: CycloptsError) -> str:
    chain = list(error.command_chain or [])
    if isinstance(error, UnknownCommandError) and error.app and error.unused_tokens:
        # Its own message would import every verb, and torch with them, to list their names.
        what = unknown_name("command", error.unused_tokens[0], [name for name in error.app if not name.startswith("-")])
    else:
        what = str(error)
    return f"{what}\n  → Type: {shlex.join(['accord', *chain, '--help'])}"


def _fail(message: str, code: int = 1) -> int:
    _print_error(message, "red")
    return code


def _print_error(message: str, colour: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(message, style=colour))
