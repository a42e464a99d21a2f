"""Files that are never half-written: write beside the target, flush to disk, then rename over it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accord.errors import ResourceError

__all__ = ["atomic_directory", "atomic_file", "disk_error", "disk_errors", "write_text"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory; rename it to `path` on success, remove it on failure.

    Raises:
        ResourceError: the disk is full or the directory cannot be written. `path` is then as it was before.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            temporary.touch(exist_ok=False)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; on success it takes the place of `path`, on failure it is removed.

    Raises:
        ResourceError: the disk is full or the directory cannot be written. `path` is then as it was before.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for torn in path.parent.glob(f".{path.name}.*"):  # left by a process that was killed here
            shutil.rmtree(torn, ignore_errors=True)
        temporary, old = _beside(path), _beside(path)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.is_dir():
                # A directory cannot be renamed over a full one: the old one steps aside, and comes back if need be.
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full, read-only or in the way into a ResourceError that names the path."""
    try:
        yield
    except Exception as error:
        cause = _system_error(error)
        explained = disk_error(cause, path) if cause else None
        if explained is None:
            raise
        raise explained from None


def disk_error(error: OSError, path: Path) -> ResourceError | None:
    """The ResourceError that explains `error`, raised while `path` was in use; None if it is of another kind."""
    if error.errno in _FULL:
        free = shutil.disk_usage(_existing(path)).free
        return ResourceError(
            f"The disk is full ({free / 1e6:.0f} MB free); nothing was half-written.",
            where=str(path),
            fix="Free some space, then run the same command again; training goes on with --resume.",
        )
    if error.errno in _REFUSED:
        fix = "Check its rights, or choose another place."
        return ResourceError(f"{error.strerror}.", where=str(path), fix=fix)
    return None


def _system_error(error: Exception) -> OSError | None:
    """The system's error; libraries written in Rust (safetensors, tokenizers) only say its number."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, OSError) or number is None:
        return error if isinstance(error, OSError) else None
    return OSError(int(number[1]), os.strerror(int(number[1])))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{path.suffix}")


def _existing(path: Path) -> Path:
    return next(parent for parent in [path, *path.absolute().parents] if parent.exists())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
