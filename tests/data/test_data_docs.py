"""docs/data.md names every format with its columns and every rule with its severity."""

from __future__ import annotations

from pathlib import Path

import pytest

from accord.data.check import RULES
from accord.data.formats import FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def table_row(name: str) -> str:
    (row,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    return row


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_documented_with_its_columns(name: str) -> None:
    assert [column for column in FORMATS[name].columns if f"`{column}`" not in table_row(name)] == []


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_documented_with_its_severity(rule: str) -> None:
    assert f"| {RULES[rule][0]} |" in table_row(rule)
