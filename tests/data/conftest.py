"""Rows in which one value, however deep, is another than it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

_ODD: tuple[Any, ...] = (None, True, -1, 1e999, float("nan"), "", "\ud800", "x", [], ["x"], [None], {}, {"x": [1]})
"""What stands in files by mistake: null, NaN, half a character, the wrong type."""


def _spoilt(value: Any) -> Iterator[Any]:
    yield from _ODD
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {other: each for other, each in value.items() if other != key}
            yield from ({**value, key: odd} for odd in _spoilt(inner))
    elif isinstance(value, list):
        yield [*value, *value]
        for place, inner in enumerate(value):
            yield from ([*value[:place], odd, *value[place + 1 :]] for odd in _spoilt(inner))


@pytest.fixture
def spoilt_rows() -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """All rows that differ from a good one in one value."""
    return lambda row: [odd for odd in _spoilt(row) if isinstance(odd, dict)]
