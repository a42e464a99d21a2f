"""The repository as the form tests see it: its own source, parsed once."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "accord"


class Source(NamedTuple):
    """A Python file: its place, its dotted name (empty outside the package), its text and its syntax tree."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return str(self.path.relative_to(REPOSITORY))


def _source(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts if path.is_relative_to(PACKAGE) else ()
    module = ".".join(part for part in parts if part != "__init__")
    return Source(path, module, text, ast.parse(text, filename=str(path)))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def package() -> list[Source]:
    """The modules of the package."""
    return [_source(path) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.fixture(scope="session")
def tests() -> list[Source]:
    """The files of the test suite."""
    return [_source(path) for path in sorted((REPOSITORY / "tests").rglob("*.py"))]


@pytest.fixture(scope="session")
def python_files(package: list[Source], tests: list[Source]) -> list[Source]:
    """All Python that we wrote."""
    folders = [REPOSITORY / "benchmarks", REPOSITORY / "examples"]
    return [*package, *tests, *(_source(path) for folder in folders for path in sorted(folder.rglob("*.py")))]


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """The files that git would carry: tracked, or new and not ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so there is no list of the repository's files")
    paths = [REPOSITORY / line for line in listing.stdout.splitlines()]
    return [path for path in paths if path.is_file()]
