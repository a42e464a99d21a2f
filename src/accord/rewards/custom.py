"""Any Python function as a reward, by import path: `package.module:function`, or `./file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field

from accord.errors import ConfigError
from accord.rewards.base import Outcome, RewardConfig, RewardFunction, beside
from accord.types import Completion, Prompt

__all__ = ["CustomConfig", "custom", "import_callable"]


class CustomConfig(RewardConfig):
    """Settings of a Python function."""

    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Seconds for one batch; after them its rewards are None. Python cannot stop the function: it goes on beside the
    run, and until it ends further batches are None at once (default: no limit)."""


def custom(config: CustomConfig, _tokenizer: Any) -> RewardFunction:
    """The function that `name` names, called as it is."""
    define = "Define it: def name(prompts, completions) -> list."
    function: RewardFunction = import_callable(config.name, "function", "rewards", define)
    return function if config.timeout is None else _Timed(function, config.timeout)


def import_callable(spec: str, noun: str, where: str, define: str) -> Any:
    """What stands behind ``package.module:name`` or ``path/to/file.py:name`` (from the current directory).

    Args:
        noun: what it is, and `where` it is named: for errors; `define` is the advice where there is none.

    Raises:
        ConfigError: it cannot be imported, is not there, or cannot be called; the message gives the reason.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        fix = f"Write package.module:{noun} or ./file.py:{noun}"
        raise ConfigError(f"{spec!r} names no {noun}.", where=where, fix=fix)
    try:
        module = _load(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except Exception as error:
        fix = f"Mend it; of a file in the current directory, write ./file.py:{noun}"
        what = f"{place} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(what, where=f"{where}, {spec}", fix=fix) from None
    found: Any = getattr(module, name, None)
    if not callable(found):
        what = f"{place} has no {noun} {name!r}." if found is None else f"{name!r} is not a {noun}."
        raise ConfigError(what, where=f"{where}, {spec}", fix=define)
    return found


def _load(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError("No such file.", where=str(path), fix="Give its path from the current directory.")
    name = f"accord_reward_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes of the file find their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Timed:
    """A reward function in a thread of its own that is waited for so long and no longer."""

    def __init__(self, function: RewardFunction, timeout: float) -> None:
        self.function, self.timeout = function, timeout
        self._busy: Future[Sequence[Outcome]] | None = None

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[Outcome]:
        if self._busy is not None and not self._busy.done():
            raise TimeoutError
        self._busy = beside(lambda: self.function(prompts, completions))
        return self._busy.result(self.timeout)
