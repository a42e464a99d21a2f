"""Reference log-probabilities: computed once, kept on disk, and attached to the trees.

The key is (weights and configuration of the model, chat template, precision, temperature, every token and mask of the
sample): a change in any of them misses the cache. One row per sample, so adding data computes the new samples only.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from accord.engine.distributed import broadcast, rank, world_size
from accord.engine.engine import Engine
from accord.errors import RunError
from accord.files import disk_errors
from accord.models.controls import control_tree
from accord.models.network import Policy
from accord.models.trees import Tree, with_reference

__all__ = ["Reference", "attach_reference"]

_CHUNK = 16


def attach_reference(
    engine: Engine,
    trees: Sequence[Tree],
    cache: Path,
    on_progress: Callable[[int, int], None],
    weights: str | None = None,
) -> list[Tree]:
    """The same trees, branches and controls, with reference log-probabilities of `engine`'s network as it is now.

    Args:
        engine: with LoRA, its adapters are switched off while it computes.
        cache: an SQLite file, made if need be.
        on_progress: called with (trees, tokens) as they are done; cached ones count no tokens, and the control branches
            of a tree count as a tree of their own.
        weights: the network's fingerprint, if it is known: hashing large weights takes seconds.
    """
    controlled = [index for index, tree in enumerate(trees) if tree.controls]
    everything = [*trees, *(control_tree(trees[index]) for index in controlled)]
    done = _with_reference(engine, _model_key(engine, weights), everything, cache, on_progress)
    attached = done[: len(trees)]
    for index, controls in zip(controlled, done[len(trees) :], strict=True):
        attached[index] = replace(attached[index], controls=controls.branches)
    return attached


class Reference:
    """The network as it is now, for trees that come later, a few at a time.

    Args:
        engine: of the network before training.
        cache: an SQLite file, made if need be.
        weights: the network's fingerprint, if it is known.
    """

    def __init__(self, engine: Engine, cache: Path, weights: str | None = None) -> None:
        self.engine, self.cache, self.key = engine, cache, _model_key(engine, weights)

    def compute(self, trees: Sequence[Tree]) -> int:
        """Put what is missing into the cache; returns how many tokens had to be computed."""
        tokens: list[int] = []
        _with_reference(self.engine, self.key, trees, self.cache, lambda _, count: tokens.append(count))
        return sum(tokens)

    def attach(self, trees: Sequence[Tree]) -> list[Tree]:
        """The same trees with reference log-probabilities; with LoRA, missing ones are computed with adapters off.

        Raises:
            RunError: without LoRA, one is missing, and the network is no longer what it was.
        """
        is_unchanged = self.engine.network.adapter is not None
        return _with_reference(self.engine, self.key, trees, self.cache, lambda *_: None, may_compute=is_unchanged)


def _with_reference(
    engine: Engine,
    model_key: str,
    trees: Sequence[Tree],
    cache: Path,
    on_progress: Callable[[int, int], None],
    *,
    may_compute: bool = True,
) -> list[Tree]:
    network = engine.network
    keys = [f"{model_key}:{tree.digest()}" for tree in trees]
    with disk_errors(cache), _open(cache) if rank() == 0 else nullcontext() as connection:
        found = broadcast(_lookup(connection, keys) if connection else {})
        missing = {key: tree for key, tree in zip(keys, trees, strict=True) if key not in found}
        if missing and not may_compute:
            fix = "Continue with --resume: what is missing is then computed again."
            raise RunError("Reference log-probabilities have vanished while in use.", where=str(cache), fix=fix)
        on_progress(len(keys) - len(missing), 0)
        # Neighbours of like length make tight micro-batches.
        order = sorted(missing, key=lambda key: len(missing[key]))
        size = _CHUNK * world_size()
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            with network.without_adapter():
                answers = engine.forward([missing[key] for key in chunk])
            rows = {key: np.concatenate(answer).tobytes() for key, answer in zip(chunk, answers, strict=True)}
            if connection:
                connection.executemany("INSERT OR REPLACE INTO reference VALUES (?, ?)", rows.items())
                connection.commit()
            found |= rows
            on_progress(len(chunk), sum(len(missing[key]) for key in chunk))
    return [_attach(tree, found[key]) for key, tree in zip(keys, trees, strict=True)]


def _model_key(engine: Engine, weights: str | None) -> str:
    template = str(engine.network.tokenizer.chat_template or "")
    digest = hashlib.blake2b(template.encode(), digest_size=16).hexdigest()
    temperature = engine.network.temperature if isinstance(engine.network, Policy) else 1.0
    return f"{weights or engine.network.fingerprint()}:{digest}:{engine.dtype}:{temperature}"


@contextmanager
def _open(cache: Path) -> Iterator[sqlite3.Connection]:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache, timeout=60)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS reference (key TEXT PRIMARY KEY, logprobs BLOB NOT NULL)")
        yield connection


def _lookup(connection: sqlite3.Connection, keys: Sequence[str]) -> dict[str, bytes]:
    rows: list[tuple[str, bytes]] = []
    for start in range(0, len(keys), 500):
        some = keys[start : start + 500]
        marks = ",".join("?" * len(some))
        rows += connection.execute(f"SELECT key, logprobs FROM reference WHERE key IN ({marks})", some).fetchall()
    return dict(rows)


def _attach(tree: Tree, blob: bytes) -> Tree:
    ends = np.cumsum([len(branch.tokens_L) for branch in tree.branches])[:-1]
    return with_reference(tree, np.split(np.frombuffer(blob, np.float32), ends))
