"""A run directory: what it was started with, and whether it may be continued.

runs/<name>/config.toml  provenance.json  metrics.jsonl  checkpoints/<step>/  model/
"""

from __future__ import annotations

import hashlib
import json
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import accord
from accord.config import Config, flatten
from accord.engine.checkpoint import latest_checkpoint
from accord.engine.distributed import gather, rank
from accord.errors import RunError
from accord.files import write_text
from accord.models.network import Network
from accord.train.examples import StreamedTrees, Trees

__all__ = ["Run", "provenance"]

_CONFIG, _PROVENANCE = "config.toml", "provenance.json"
_IDENTITY = ("data", "model", "template")


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory that belongs to one configuration, one model and one data set."""

    directory: Path
    weights: str | None = None
    """The hash of the model that is to be trained, where `open` was told (`Network.fingerprint`)."""

    @classmethod
    def open(cls, directory: Path, config: Config, facts: Mapping[str, Any], *, resume: bool) -> Run:
        """Start a run, or take up the one that is there.

        Raises:
            RunError: the directory is taken; or it is to be resumed and settings, model or data are not the same.
        """
        model = facts["model"]
        run = cls(directory, model["hash"] if isinstance(model, Mapping) else None)
        if rank() == 0:
            run._take(config, facts, resume=resume)
        gather(None)  # the others go on once it is taken
        return run

    def _take(self, config: Config, facts: Mapping[str, Any], *, resume: bool) -> None:
        self.require_free(resume=resume)
        if self._started:
            self._require_same(config, facts)
        else:
            write_text(self.directory / _CONFIG, config.to_toml())
            write_text(self.directory / _PROVENANCE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

    def require_free(self, *, resume: bool) -> None:
        """Nothing happens to a run, or to other files, that the user does not mean to continue.

        Raises:
            RunError: the directory is taken.
        """
        if self._started and not resume:
            fix = "Continue it with --resume, or choose another directory with --out."
            raise RunError("This directory already holds a run.", where=str(self.directory), fix=fix)
        if self.directory.exists() and not self.directory.is_dir():
            fix = "Choose another directory with --out."
            raise RunError("This is a file, not a directory.", where=str(self.directory), fix=fix)
        if self.directory.is_dir() and any(self.directory.iterdir()) and not resume:
            fix = "Choose another directory with --out."
            raise RunError("This directory is not empty and holds no run.", where=str(self.directory), fix=fix)

    @property
    def _started(self) -> bool:
        return (self.directory / _PROVENANCE).exists()

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def finished(self) -> bool:
        """The model is the last thing that a run writes."""
        return self.model.exists()

    def latest(self) -> Path | None:
        return latest_checkpoint(self.checkpoints)

    def _require_same(self, config: Config, facts: Mapping[str, Any]) -> None:
        fix = "Use what the run was started with, or start another --out."
        try:
            before = flatten(tomllib.loads((self.directory / _CONFIG).read_text(encoding="utf-8")))
            identity = json.loads((self.directory / _PROVENANCE).read_text(encoding="utf-8"))
            old = {key: identity[key] for key in _IDENTITY}
        except (OSError, ValueError, KeyError, TypeError):
            what = f"{_CONFIG} or {_PROVENANCE} is missing or damaged, so this run cannot be continued."
            raise RunError(what, where=str(self.directory), fix="Start another --out.") from None
        now = flatten(tomllib.loads(config.to_toml()))
        changed = [
            f"{key} was {before.get(key, 'not set')} and is {now.get(key, 'not set')}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise RunError(f"The settings have changed: {'; '.join(changed)}.", where=str(self.directory), fix=fix)
        for key in _IDENTITY:
            if _nameless(old[key]) != _nameless(facts[key]):
                what = f"The {key} has changed since the run was started."
                raise RunError(what, where=str(self.directory), fix=fix)


def _nameless(fact: Any) -> Any:
    """What decides whether two are the same: the hash, not what a file was called."""
    return {key: value for key, value in fact.items() if key != "name"} if isinstance(fact, Mapping) else fact


def provenance(network: Network, model: str, data: str, trees: Trees, seed: int) -> dict[str, Any]:
    """Where a run's numbers come from: data, model and template by hash, versions, machine."""
    template = str(network.tokenizer.chat_template or "")
    return {
        "data": {"name": data, "rows": len(trees), "hash": _data_hash(trees)},
        "model": {"name": model, "hash": network.fingerprint()},
        "template": hashlib.blake2b(template.encode(), digest_size=16).hexdigest(),
        "seed": seed,
        "versions": {
            "accord": accord.__version__,
            "code": _code_hash(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "peft")},
        },
        "machine": f"{platform.system()} {platform.machine()}, {network.device}",
    }


def _data_hash(trees: Trees) -> str:
    """Of the tokens that training sees; for data that streams, of its files."""
    if isinstance(trees, StreamedTrees):
        return trees.rows.hash
    rows = hashlib.blake2b(digest_size=16)
    for tree in trees:
        rows.update(tree.digest().encode())
        rows.update(repr((tree.ranks, tree.margin, tree.probability, tree.ratings, tree.labels)).encode())
    return rows.hexdigest()


def _code_hash() -> str:
    state = hashlib.blake2b(digest_size=16)
    root = Path(accord.__file__).parent
    for path in sorted(root.rglob("*.py")):
        state.update(path.relative_to(root).as_posix().encode())
        state.update(path.read_bytes())
    return state.hexdigest()
