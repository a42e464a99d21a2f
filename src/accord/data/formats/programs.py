"""Programming problems with unit tests, for the reward `python_tests`: HumanEval (Chen et al. 2021) and MBPP (Austin
et al. 2021), whose columns many other sets have."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, content, items, row_id, string, user_turn
from accord.errors import RowError
from accord.types import Prompt, Record, Source

__all__ = ["read_function", "read_task"]

Row = Mapping[str, Any]


def read_function(row: Row, source: Source) -> list[Record]:
    """prompt: the head of a function; test: a function `check` of it; entry_point: its name."""
    test, name = string(row, "test", source), string(row, "entry_point", source)
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in _parsed(test, source)):
        fix = "Define check(candidate) in it, or give assert lines in a column `tests`."
        raise RowError("Column 'test' defines no function check.", where=str(source), fix=fix)
    tests = f"{test}\ncheck({name})"
    _parsed(tests, source)
    return [Prompt(row_id(row, source), content(row, "prompt", source), source=source, answer=tests)]


def read_task(row: Row, source: Source) -> list[Record]:
    """test_list, a task in `prompt` or `text`, and optionally test_imports or test_setup_code.

    The tests are shown, as in the paper: they alone say what the function is called.
    """
    shown = _lines(row, "test_list", source)
    before = _lines(row, "test_imports", source)
    if row.get("test_setup_code"):
        before.append(string(row, "test_setup_code", source))
    tests = "\n".join([*before, *shown])
    _parsed(tests, source)
    task = string(row, "prompt" if "prompt" in row else "text", source)
    asked = user_turn(task, "\n".join(["Your code should pass these tests:", "", *shown]))
    return [Prompt(row_id(row, source), asked, source=source, answer=tests)]


def _lines(row: Row, column: str, source: Source) -> list[str]:
    if row.get(column) is None:
        return []
    found = items(row, column, source)
    return [string({column: item}, column, source) for item in found]


def _parsed(tests: str, source: Source) -> list[ast.stmt]:
    try:
        return ast.parse(tests).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        fix = "Mend the tests, or leave out the row."
        raise RowError(f"The tests are not Python: {error}", where=str(source), fix=fix) from None


FORMATS.add("humaneval", Format(("prompt", "test", "entry_point"), "Prompt", read_function))
FORMATS.add("mbpp", Format(("text", "test_list"), "Prompt", read_task))
FORMATS.add("mbpp-sanitized", Format(("prompt", "test_list"), "Prompt", read_task))
