"""What a terminal shows of a running stage: % done, rate, time left."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

__all__ = ["Progress"]

_WINDOW_S = 30.0  # the moving rate looks this far back
_GRAIN_S = 0.25  # points of the moving rate lie at least this far apart, so that the window stays small
_PLAIN_EVERY_S = 5.0
_BAR_CELLS = 24


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
