"""The import law: a part of the package imports only what stands above it. There is no list of exceptions."""

from __future__ import annotations

import ast
import subprocess
import sys

# The layout, from records to the command line. A part imports itself and the parts above it.
ORDER = (
    *("types", "errors", "files", "config", "registry", "tracking", "stats", "store", "data"),
    *("models", "losses", "advantages", "engine", "sampling", "feedback", "safety", "rewards", "environments"),
    *("train", "evaluate", "serve", "loop", "testing", "cli", "__main__"),
)
PURE = {"types", "errors", "config", "registry"}
"""What the mathematics in `losses` and `advantages` may import from the package, beside torch."""
TORCH = {"accelerate", "peft", "torch", "transformers", "trl"}
"""Packages that import torch, and torch."""
TORCH_STARTS = ORDER.index("models")


def part(module: str) -> str:
    """`accord.data.check` belongs to `data`; `accord` itself stands above all parts."""
    return module.partition(".")[2].partition(".")[0]


def imports(source) -> list[tuple[str, int]]:
    """Every module that a file imports, at its top or inside a function, with the line."""
    found = []
    package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            target = ".".join(filter(None, [base, node.module]))
            found.append((target, node.lineno))
            if target == "accord":  # `from accord import data` imports the part `data`; `__version__` is no part.
                found += [(f"accord.{alias.name}", node.lineno) for alias in node.names if alias.name in ORDER]
    return found


def test_every_part_has_a_place_in_the_order(package):
    parts = {part(source.module) for source in package} - {""}
    assert parts <= set(ORDER), f"no place in the import order: {sorted(parts - set(ORDER))}"


def test_a_part_imports_only_what_stands_above_it(package):
    wrong = [
        f"{source.name}:{line} imports {name}"
        for source in package
        for name, line in imports(source)
        if name.partition(".")[0] == "accord"
        and part(name)
        and (not part(source.module) or ORDER.index(part(name)) > ORDER.index(part(source.module)))
    ]
    assert not wrong, "\n".join(wrong)


def test_losses_and_advantages_import_only_records_and_torch(package):
    wrong = [
        f"{source.name}:{line} imports {name}"
        for source in package
        if part(source.module) in {"losses", "advantages"}
        for name, line in imports(source)
        if name.partition(".")[0] == "accord" and part(name) not in {"", *PURE, part(source.module)}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_torch_above_models(package):
    wrong = [
        f"{source.name}:{line} imports {name}"
        for source in package
        if part(source.module) in ORDER[:TORCH_STARTS]
        for name, line in imports(source)
        if name.partition(".")[0] in TORCH
    ]
    assert not wrong, "\n".join(wrong)


def test_light_modules_import_without_torch(package):
    """Everything above `models`, the annotation app, the gateway and the command line: imported in a fresh process."""
    light = [
        source.module
        for source in package
        if part(source.module) in {"", "cli", "serve", *ORDER[:TORCH_STARTS]}
        or source.module.startswith("accord.feedback.people")
    ]
    script = (
        "import importlib, sys\n"
        f"for module in {light!r}:\n"
        "    importlib.import_module(module)\n"
        f"    heavy = sorted({TORCH!r} & set(sys.modules))\n"
        "    if heavy:\n"
        "        sys.exit(f'importing {module} imports {heavy}')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
