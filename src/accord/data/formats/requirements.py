"""Prompts with requirements that a program can check; `accord.data.requirements` knows the kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accord.data.formats.base import FORMATS, Format, answer, content, items, row_id
from accord.data.requirements import parse
from accord.errors import ConfigError, RowError
from accord.types import Prompt, Record, Requirement, Source

__all__ = ["read"]


def read(row: Mapping[str, Any], source: Source) -> list[Record]:
    """prompt, requirements: [{kind, ...options}, ...], and optionally the answer."""
    requirements = tuple(_requirement(item, source) for item in items(row, "requirements", source))
    return [Prompt(row_id(row, source), content(row, "prompt", source), requirements, source, answer(row, source))]


def _requirement(item: Any, source: Source) -> Requirement:
    if not isinstance(item, dict):
        what = f"A requirement must be an object, not {type(item).__name__}."
        raise RowError(what, where=str(source), fix='Write {"kind": "max_words", "count": 20}')
    # Columnar files fill the options of other kinds with null.
    options = {key: value for key, value in item.items() if value is not None}
    try:
        return parse(options)
    except ConfigError as error:
        raise RowError(error.what, where=str(source), fix=error.fix or "Mend its kind and options.") from None


FORMATS.add("requirements", Format(("prompt", "requirements"), "Prompt", read))
