"""Built-in tools: arithmetic, and Python in a process that may do little else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from accord.rewards.python_tests import PythonTestsConfig, run_shown

__all__ = ["calculator", "python"]

_LARGEST = 10**60
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "max": max,
    "min": min,
    "round": round,
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "sin", "cos", "tan", "floor", "ceil")},
}
_CONSTANTS = {"pi": math.pi, "e": math.e}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression, such as (12 + 5) * 3 / 7. Knows + - * / // % **, sqrt, exp, log, sin, cos, tan,
    abs, min, max, round, floor, ceil, pi and e."""
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError("this is no arithmetic expression") from None
    except OverflowError:
        raise ValueError("the result is too large, or no real number") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value)


def python(code: str) -> str:
    """Run a Python program. Answers what it prints, and the value of its last line; nothing is kept for the next call.
    Two seconds, standard library, no files and no network."""
    return run_shown(code, PythonTestsConfig(name="python"))


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.BinOp(left, kind, right) if type(kind) in _OPERATORS:
            a, b = _value(left), _value(right)
            if isinstance(kind, ast.Pow) and isinstance(a, int) and isinstance(b, int):
                a = float(a) if b > 200 or b < 0 else a  # no integers of a million digits
            return _bounded(_OPERATORS[type(kind)](a, b))
        case ast.UnaryOp(kind, operand) if type(kind) in _OPERATORS:
            return _OPERATORS[type(kind)](_value(operand))
        case ast.Call(ast.Name(name), arguments, []) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*map(_value, arguments)))
        case ast.Name(name) if name in _CONSTANTS:
            return _CONSTANTS[name]
    raise ValueError("this is no arithmetic expression")


def _bounded(value: Any) -> Any:
    if isinstance(value, complex) or abs(value) > _LARGEST:
        raise ValueError("the result is too large, or no real number")
    return value
