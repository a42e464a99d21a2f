"""What a round leaves on disk between its stages: one JSON row per record, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from accord.errors import RunError
from accord.files import write_text

__all__ = ["read_records", "write_records", "write_rows"]

T = TypeVar("T")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_records(path: Path, kind: type[T], records: Sequence[T]) -> None:
    """Write records of one kind, one a line."""
    adapter = TypeAdapter(kind)
    write_text(path, "".join(adapter.dump_json(record).decode() + "\n" for record in records))


def read_records(path: Path, kind: type[T]) -> list[T]:
    """Read what `write_records` wrote.

    Raises:
        RunError: a row is not such a record (the file was changed by hand).
    """
    adapter = TypeAdapter(kind)
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(adapter.validate_json(line))
        except ValidationError as error:
            fix = "Remove the file and run again with --resume: the stage is done anew."
            what = f"Not a {kind.__name__}: {error.errors()[0]['msg']}."
            raise RunError(what, where=f"{path}:{number}", fix=fix) from None
    return records
