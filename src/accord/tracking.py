"""What a run tells: `metrics.jsonl` (always), a line of progress, and an HTML page of samples.

metrics.jsonl holds one JSON object per logged step, ``{"step": 7, "loss": 0.61, …}``; steps increase strictly, and each
stands exactly once, also after a kill and a resume.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from accord.errors import RunError
from accord.files import disk_errors, write_text

__all__ = ["METRICS_FILE", "Progress", "Sample", "Tracker", "read_metrics", "write_samples"]

METRICS_FILE = "metrics.jsonl"

_WINDOW_S = 30.0  # the moving rate looks this far back
_GRAIN_S = 0.25  # points of the moving rate lie at least this far apart, so that the window stays small
_PLAIN_EVERY_S = 5.0
_BAR_CELLS = 24


class Tracker:
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
        >>> with Tracker(Path(tempfile.mkdtemp())) as tracker:
        ...     tracker.log(1, {"loss": 0.69})
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


@dataclass
class _Rate:
    """Moving rates of steps and work over the last `_WINDOW_S` seconds, or over one step where steps are longer."""

    points: deque[tuple[float, int, float]] = field(default_factory=deque)

    def add(self, now: float, steps: int, work: float) -> None:
        if len(self.points) > 1 and now - self.points[-2][0] < _GRAIN_S:
            self.points.pop()
        self.points.append((now, steps, work))
        while len(self.points) > 2 and now - self.points[1][0] >= _WINDOW_S:
            self.points.popleft()

    def per_second(self) -> tuple[float, float]:
        """Steps and work per second; zeros before the first step."""
        (start, steps, work), (end, steps_now, work_now) = self.points[0], self.points[-1]
        seconds = end - start
        return ((steps_now - steps) / seconds, (work_now - work) / seconds) if seconds > 0 else (0.0, 0.0)


class Progress:
    """One stage's progress: % done, rate, time left, a few live metrics.

    On a terminal one live line; elsewhere a plain line at the start, at most every 5 seconds, and at the end. Show one
    at a time. Written to standard error by default, so that standard output stays free for results.

    Args:
        stage: its name, such as "DPO".
        total: number of steps; None if nobody knows, as in a stream.
        unit: what `work` counts; the rate is shown in units per second.
        done: steps that an earlier, interrupted run has finished.
        quiet: show nothing.
        file: where to write (default: standard error).
        clock: seconds; injected by tests.

    Example:
        >>> with Progress("DPO", total=118, unit="tokens", quiet=True) as progress:
        ...     progress.advance(1, work=842, loss=0.61, accuracy=0.8)
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        *,
        unit: str = "tokens",
        done: int = 0,
        quiet: bool = False,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.unit, self.done, self.work = stage, total, unit, done, 0.0
        self.metrics: dict[str, float] = {}
        self._clock, self._rate = clock, _Rate()
        self._file = file if file is not None else sys.stderr
        self._console = Console(file=self._file, highlight=False)
        self._live: Live | None = None
        self._quiet = quiet
        self._start = self._shown = 0.0

    def __enter__(self) -> Self:
        self._start = self._shown = self._clock()
        self._rate.add(self._start, self.done, 0.0)
        if self._quiet:
            return self
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Prints go above the live line; a standard output that is a file or a pipe is left alone.
            self._live = Live(
                get_renderable=self._bar_line,
                console=self._console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        else:
            self._print(self.line())
        return self

    def advance(self, steps: int = 1, /, *, work: float = 0.0, **metrics: float) -> None:
        """Count `steps` more as done, `work` units more as processed, and show these metrics from now on."""
        self.done += steps
        self.work += work
        self.metrics = {**self.metrics, **metrics}  # a new one: the live line reads it from its own thread
        now = self._clock()
        self._rate.add(now, self.done, self.work)
        if not self._quiet and self._live is None and now - self._shown >= _PLAIN_EVERY_S:
            self._shown = now
            self._print(self.line())

    def eta(self) -> float | None:
        """Seconds left at the moving rate; None before the first step, and where the total is not known."""
        if self.total is None:
            return None
        steps_per_second, _ = self._rate.per_second()
        left = max(self.total - self.done, 0)
        return left / steps_per_second if steps_per_second > 0 else None

    def line(self) -> str:
        """The state as plain text."""
        return "  ".join([f"{self.stage:<14}", *self._facts()])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._quiet:
            return
        seconds = self._clock() - self._start
        parts = [f"{self.stage:<14}", *self._share(), "done" if kind is None else "stopped", _duration(seconds)]
        if self.work and seconds > 0:
            parts.append(f"{_quantity(self.work / seconds)} {self.unit}/s")
        self._print("  ".join([*parts, *self._live_metrics()]))

    def _share(self) -> list[str]:
        if self.total is None:
            return [f"{self.done:,}"]
        percent = 100 * self.done // self.total if self.total else 100
        return [f"{percent:3d} %", f"{self.done}/{self.total}"]

    def _live_metrics(self) -> list[str]:
        return [f"{name} {value:.4g}" for name, value in self.metrics.items()]

    def _facts(self) -> list[str]:
        _, work_per_second = self._rate.per_second()
        eta = self.eta()
        rate = f"{_quantity(work_per_second)} {self.unit}/s" if work_per_second else f"-- {self.unit}/s"
        left = [f"ETA {_duration(eta) if eta is not None else '--'}"] if self.total is not None else []
        return [*self._share(), rate, *left, *self._live_metrics()]

    def _bar_line(self) -> Text:
        name, facts = f"{self.stage:<14}  ", "  ".join([*self._facts(), _duration(self._clock() - self._start)])
        cells = 0 if self.total is None else max(0, min(_BAR_CELLS, self._console.width - len(name) - len(facts) - 3))
        filled = min(cells * self.done // self.total, cells) if self.total else cells
        full, empty = ("#", "-") if self._console.options.ascii_only else ("━", "─")
        bar = [(full * filled, "green"), (empty * (cells - filled) + "  ", "dim")] if cells else []
        return Text.assemble((name, "bold"), *bar, facts, no_wrap=True, overflow="ellipsis")

    def _print(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _quantity(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of the sample page; `note` says what is known about it (step, reward, what failed).

    Example: ``Sample("Name a colour.", "Blue", note="step 20 · reward 1.3")``
    """

    prompt: str
    completion: str
    note: str = ""


def write_samples(path: Path, samples: Iterable[Sample], title: str = "Samples") -> None:
    """Write the samples as one self-contained HTML page, atomically. Text is escaped: it can do nothing to the page."""
    items = "\n".join(
        f"<article><h2>{escape(sample.note)}</h2><pre class=prompt>{escape(sample.prompt)}</pre>"
        f"<pre>{escape(sample.completion)}</pre></article>"
        for sample in samples
    )
    write_text(path, _SAMPLES_PAGE.format(title=escape(title), items=items or "<p>No samples.</p>"))


_SAMPLES_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: .8rem; font-weight: 500; opacity: .7; margin: 1.5rem 0 .25rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; padding: .5rem .75rem; }}
pre.prompt {{ opacity: .7; border-left: 3px solid currentColor; }}
</style>
<h1>{title}</h1>
{items}
</html>
"""
