"""metrics.jsonl: one JSON object per logged step, ``{"step": 7, "loss": 0.61, …}``.

Steps increase strictly, and each stands exactly once, also after a kill and a resume.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from accord.errors import RunError
from accord.files import disk_errors, write_text

__all__ = ["METRICS_FILE", "MetricsFile", "read_metrics"]

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends the metrics of each step to ``run_dir/metrics.jsonl``; a logged row survives a kill.

    Args:
        run_dir: created when missing.
        resume_step: None for a new run. Otherwise the step of the checkpoint that the run continues from (0: from the
            start); rows of later steps are cut off, because those steps will be run again.

    Raises:
        RunError: a new run finds metrics of an earlier one, or the file has a row that cannot be read.
        ResourceError: the disk is full. The file then ends with the last complete row.

    Example:
        >>> import tempfile
        >>> with MetricsFile(Path(tempfile.mkdtemp())) as file:
        ...     file.log(1, {"loss": 0.69})
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        self.path = run_dir / METRICS_FILE
        rows = _rows(self.path)
        if resume_step is None and rows:
            raise RunError(
                f"This run already has metrics of {len(rows)} steps.",
                where=str(self.path),
                fix="Continue it with --resume, or choose another directory with --out.",
            )
        kept = [line for line, row in rows if resume_step is not None and row["step"] <= resume_step]
        text = "".join(f"{line}\n" for line in kept)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_text(self.path, text)
        self._last: int = json.loads(kept[-1])["step"] if kept else -1
        self._file = self.path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row and force it to disk.

        Raises:
            RunError: the step is not later than the last one, or a value is NaN or infinite.
            ResourceError: the disk is full; nothing of the row is left in the file.
        """
        where = f"{self.path}, step {step}"
        if step <= self._last:
            raise RunError(f"Step {step} comes after step {self._last}.", where=where, fix="Log every step once.")
        if "step" in metrics:
            raise RunError("A metric cannot be named 'step'.", where=where, fix="Rename the metric.")
        bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if bad:
            fix = "Lower the learning rate, or train in float32; then continue with --resume."
            raise RunError(f"Not a finite number: {', '.join(bad)}.", where=where, fix=fix)
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        line = memoryview(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        size = os.fstat(self._file.fileno()).st_size
        with disk_errors(self.path):
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(size)
                raise
        self._last = step

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The rows of ``run_dir/metrics.jsonl`` in order of steps; none if there is no such file. A torn end is left out.

    Raises:
        RunError: a row before the end cannot be read.
    """
    return [row for _, row in _rows(run_dir / METRICS_FILE)]


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each complete row as its line and its values. A process killed while writing leaves a torn last line only."""
    if not path.exists():
        return []
    *complete, _torn = path.read_bytes().split(b"\n")
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, raw in enumerate(complete, start=1):
        try:
            line = raw.decode()
            row = json.loads(line)
            if not isinstance(row["step"], int) or (rows and row["step"] <= rows[-1][1]["step"]):
                raise ValueError("steps do not increase")
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"Not a row of metrics: {error}.",
                where=f"{path}:{number}",
                fix="Delete this line, then run the same command with --resume.",
            ) from None
        rows.append((line, row))
    return rows
