"""Budgets of size. Raising one takes a reasoned line in docs/LOG.md."""

from __future__ import annotations

import ast

FILE_LINES = 500
FUNCTION_LINES = 80


def test_files_are_short(python_files):
    lines = {source.name: len(source.text.splitlines()) for source in python_files}
    long = [f"{name}: {count} lines" for name, count in lines.items() if count > FILE_LINES]
    assert not long, f"over {FILE_LINES} lines:\n" + "\n".join(long)


def test_functions_are_short(python_files):
    long = [
        f"{source.name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for source in python_files
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert not long, f"over {FUNCTION_LINES} lines:\n" + "\n".join(long)
