"""What is public is pinned: exports.txt holds the names of every package, and changes only on purpose.

After such a change, write it anew: `python tests/form/test_exports.py`.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import accord

PINNED = Path(__file__).with_name("exports.txt")


def exports() -> str:
    """One line per package: its name, then the names that it exports itself (its modules export theirs)."""
    packages = ["accord", *(info.name for info in pkgutil.walk_packages(accord.__path__, "accord.") if info.ispkg)]
    names = {package: sorted(getattr(importlib.import_module(package), "__all__", [])) for package in sorted(packages)}
    return "".join(f"{package}: {' '.join(names[package]) or '-'}\n" for package in names)


def test_package_exports_are_pinned():
    assert exports() == PINNED.read_text(encoding="utf-8"), (
        f"if that is meant: python {PINNED.with_name(Path(__file__).name)}"
    )


def test_every_module_with_public_names_lists_them(package):
    silent = [
        source.name
        for source in package
        if _public_names(source.tree.body) and not _assigns(source.tree.body, "__all__")
    ]
    assert not silent, f"without __all__: {silent}"


def test_every_exported_name_exists_once(package):
    for source in package:
        if not _assigns(source.tree.body, "__all__"):
            continue
        module = importlib.import_module(source.module)
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, f"{source.name} exports {missing}, which it does not have"
        assert len(set(module.__all__)) == len(module.__all__), f"{source.name} exports a name twice"


def _assigns(body: list[ast.stmt], name: str) -> bool:
    return name in {target.id for node in body for target in _targets(node)}


def _targets(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


def _public_names(body: list[ast.stmt]) -> list[str]:
    """Names that a module defines at its top; what it imports is not its own."""
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    assigned = [target.id for node in body for target in _targets(node)]
    return [name for name in [*defined, *assigned] if not name.startswith("_")]


if __name__ == "__main__":
    PINNED.write_text(exports(), encoding="utf-8")
