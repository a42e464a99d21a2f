"""docs/data.md names every format with its columns and every rule with its severity."""

from __future__ import annotations

from pathlib import Path

import pytest

from accord.data.check import RULES
from accord.data.formats import FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def table_rows(name: str) -> list[str]:
    """The rows of the page's tables that begin with the name."""
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_documented_with_its_columns(name: str) -> None:
    assert any(all(f"`{column}`" in row for column in FORMATS[name].columns) for row in table_rows(name))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_documented_with_its_severity(rule: str) -> None:
    assert any(f"| {RULES[rule][0]} |" in row for row in table_rows(rule))
