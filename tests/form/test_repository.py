"""What the repository may not hold: stubs, tests that test nothing, and words of the machine that it was written on."""

from __future__ import annotations

import ast
import re

# Each is split in two, so that this file does not hold the word itself.
WORDS = [
    first + second
    for first, second in [
        ("/wo", "rk/"),
        ("/ro", "ot/"),
        ("/opt/", "wheels"),
        ("/opt/", "pypi"),
        ("py", "pi.org"),
        ("python", "hosted"),
        ("download.py", "torch.org"),
        ("arti", "factory"),
        ("index", "-url"),
    ]
]
STUBS = ("NotImplemented" + "Error", "TO" + "DO", "FIX" + "ME", "X" * 3)


def test_no_machine_path_and_no_registry_host(tracked_files, repository):
    found = [
        f"{path.relative_to(repository)}: {word}"
        for path in tracked_files
        for text in [path.read_text(encoding="utf-8", errors="replace")]
        for word in WORDS
        if word in text
    ]
    assert not found, "\n".join(found)


def test_no_stub_words(python_files):
    words = re.compile(rf"\b({'|'.join(STUBS)})\b")
    found = [
        f"{source.name}:{number}: {line.strip()}"
        for source in python_files
        for number, line in enumerate(source.text.splitlines(), start=1)
        if words.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_page_that_the_source_points_to_exists(package, repository):
    pages = {(source.name, page) for source in package for page in re.findall(r"docs/[\w/]+\.md", source.text)}
    missing = [f"{name} points to {page}" for name, page in sorted(pages) if not (repository / page).is_file()]
    assert not missing, "\n".join(missing)


def test_no_function_without_a_body(package):
    """`pass` or `...` is the body of no function, save a protocol's method or an overload."""
    empty = []
    for source in package:
        protocols = {
            method
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ClassDef)
            and "Protocol" in {ast.unparse(base).partition("[")[0] for base in node.bases}
            for method in node.body
        }
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node in protocols:
                continue
            if any(
                ast.unparse(decorator).endswith(("overload", "abstractmethod")) for decorator in node.decorator_list
            ):
                continue
            statements = node.body if ast.get_docstring(node) is None else node.body[1:]
            if statements and all(_is_empty(statement) for statement in statements):
                empty.append(f"{source.name}:{node.lineno} {node.name}")
    assert not empty, "\n".join(empty)


def test_every_test_asserts(tests):
    """Each test function asserts, expects an exception, or calls a helper of its file or a library that does."""
    idle = []
    for source in tests:
        functions = {node.name: node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)}
        asserting = {name for name, node in functions.items() if _asserts(node)}
        for name, node in functions.items():
            if name.startswith("test_") and name not in asserting and not (_calls(node) & asserting):
                idle.append(f"{source.name}:{node.lineno} {name}")
    assert not idle, "these assert nothing:\n" + "\n".join(idle)


def test_every_test_module_has_tests(tests):
    empty = [
        source.name
        for source in tests
        if source.path.name.startswith("test_")
        and not any(
            isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in ast.walk(source.tree)
        )
    ]
    assert not empty, f"no test in {empty}"


def _is_empty(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or ast.unparse(statement) == "..."


def _calls(node: ast.AST) -> set[str]:
    called = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
    return {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in called}


def _asserts(node: ast.AST) -> bool:
    statements = [child for child in ast.walk(node) if isinstance(child, ast.Assert)]
    real = any(not isinstance(statement.test, ast.Constant) for statement in statements)
    return real or any(name.startswith("assert_") or name in {"raises", "warns"} for name in _calls(node))
