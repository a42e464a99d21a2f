"""metrics.jsonl survives kills at any byte; progress arithmetic under an injected clock; the sample page is inert."""

from __future__ import annotations

import io
import json
import math
import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import RunError
from accord.tracking import METRICS_FILE, MetricsFile, Progress, Sample, read_metrics, write_samples


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps_of(run_dir: Path) -> list[float]:
    return [row["step"] for row in read_metrics(run_dir)]


def test_a_stream_of_unknown_length_has_a_rate_and_no_end() -> None:
    clock, file = Clock(), io.StringIO()
    with Progress("check", total=None, unit="rows", file=file, clock=clock) as progress:
        clock.now += 10
        progress.advance(2000, work=2000)
        assert progress.eta() is None
    assert [line.split() for line in file.getvalue().splitlines()] == [
        ["check", "0", "--", "rows/s"],
        ["check", "2,000", "200", "rows/s"],
        ["check", "2,000", "done", "0:10", "200", "rows/s"],
    ]


def test_one_json_row_per_step(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "new") as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(3, {"loss": 0.25, "accuracy": 1})
    lines = (tmp_path / "new" / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 0.25, "accuracy": 1}]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), total=st.integers(1, 12))
def test_kill_at_any_byte_then_resume_is_gap_free(data: st.DataObject, total: int) -> None:
    """A run of `total` steps with a checkpoint at `saved` is cut at any byte after that step's row. The resumed run
    repeats the steps after `saved`. The file must equal, byte for byte, that of a run that was never killed."""
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        with MetricsFile(whole) as tracker:
            for step in range(1, total + 1):
                tracker.log(step, {"loss": 1 / step, "größe": step / 3})
        complete = (whole / METRICS_FILE).read_bytes()
        saved = data.draw(st.integers(0, total), label="saved")
        safe = len(b"".join(complete.splitlines(keepends=True)[:saved]))
        kill = data.draw(st.integers(safe, len(complete)), label="kill")
        killed.mkdir()
        (killed / METRICS_FILE).write_bytes(complete[:kill])
        with MetricsFile(killed, resume_step=saved) as tracker:
            assert steps_of(killed) == list(range(1, saved + 1))
            for step in range(saved + 1, total + 1):
                tracker.log(step, {"loss": 1 / step, "größe": step / 3})
        assert (killed / METRICS_FILE).read_bytes() == complete


def test_new_run_refuses_the_metrics_of_another(tmp_path: Path) -> None:
    with MetricsFile(tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
    with pytest.raises(RunError, match="--resume"):
        MetricsFile(tmp_path)
    assert steps_of(tmp_path) == [1]


def test_new_run_may_start_over_a_torn_first_row(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "lo')
    with MetricsFile(tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_broken_row_before_the_end_is_named(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": oops}\n{"step": 3}\n')
    with pytest.raises(RunError, match=rf"{METRICS_FILE}:2"):
        MetricsFile(tmp_path, resume_step=3)
    assert (tmp_path / METRICS_FILE).read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("step", "metrics", "words"),
    [
        (1, {"loss": 1.0}, "after step 1"),
        (2, {"loss": math.nan}, "loss"),
        (2, {"grad_norm": math.inf}, "grad_norm"),
        (2, {"step": 7.0}, "step"),
    ],
)
def test_refused_rows_leave_the_file_alone(tmp_path: Path, step: int, metrics: dict[str, float], words: str) -> None:
    with MetricsFile(tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
        with pytest.raises(RunError, match=words):
            tracker.log(step, metrics)
        tracker.log(2, {"loss": 0.5})
    assert steps_of(tmp_path) == [1, 2]


def test_a_row_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the file's size makes the system write half of the row and then refuse, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsFile(tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
        before = (tmp_path / METRICS_FILE).read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 8, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                tracker.log(2, {"loss": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / METRICS_FILE).read_bytes() == before
        tracker.log(2, {"loss": 0.5})
    assert steps_of(tmp_path) == [1, 2]


def test_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_rate_and_eta() -> None:
    """10 steps of 2 s with 50 tokens each: 25 tokens/s, and the 30 steps left take 60 s."""
    clock = Clock()
    with Progress("DPO", total=40, file=io.StringIO(), clock=clock) as progress:
        assert progress.eta() is None
        for _ in range(10):
            clock.now += 2
            progress.advance(1, work=50, loss=0.61)
        assert progress.eta() == pytest.approx(60)
        assert progress.line().split("  ", 1)[1].split() == [
            "25",
            "%",
            "10/40",
            "25",
            "tokens/s",
            "ETA",
            "1:00",
            "loss",
            "0.61",
        ]


def test_rate_forgets_a_slow_start() -> None:
    """The first step takes 100 s (warm-up), the others 1 s: after 60 of them the rate is that of the others."""
    clock = Clock()
    with Progress("SFT", total=161, file=io.StringIO(), clock=clock) as progress:
        clock.now += 100
        progress.advance(1, work=1)
        assert progress.eta() == pytest.approx(16_000)
        for _ in range(60):
            clock.now += 1
            progress.advance(1, work=7)
        assert progress.eta() == pytest.approx(100)
        assert "7 tokens/s" in progress.line()


@given(steps=st.lists(st.floats(1e-4, 100), min_size=1, max_size=80))
@settings(deadline=None)
def test_rate_is_that_of_some_recent_stretch(steps: list[float]) -> None:
    """Whatever the timing: the moving rate lies between the slowest and the fastest step."""
    clock = Clock()
    with Progress("x", total=1000, quiet=True, clock=clock) as progress:
        for seconds in steps:
            clock.now += seconds
            progress.advance()
        eta = progress.eta()
        assert eta is not None
        per_step = eta / (1000 - len(steps))
        assert min(steps) * 0.999 - 1e-9 <= per_step <= max(steps) * 1.001 + 1e-9


def test_resumed_stage_counts_earlier_steps_but_not_in_its_rate() -> None:
    clock = Clock()
    with Progress("DPO", total=100, done=50, file=io.StringIO(), clock=clock) as progress:
        clock.now += 1
        progress.advance(1, work=10)
        assert progress.eta() == pytest.approx(49)
        assert "51 %" in progress.line()


def test_plain_lines_come_at_most_every_five_seconds() -> None:
    """60 steps of 1 s: one line at the start, one after every 5 s (12), one at the end."""
    clock, file = Clock(), io.StringIO()
    with Progress("Sampling", total=60, file=file, clock=clock) as progress:
        for _ in range(60):
            clock.now += 1
            progress.advance(1, work=3)
    lines = file.getvalue().splitlines()
    assert len(lines) == 14
    assert "\x1b" not in file.getvalue()
    assert lines[-1].split() == ["Sampling", "100", "%", "60/60", "done", "1:00", "3", "tokens/s"]


def test_interrupted_stage_says_so() -> None:
    file = io.StringIO()

    def interrupted() -> None:
        with Progress("DPO", total=4, file=file, clock=Clock()) as progress:
            progress.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.getvalue().splitlines()[-1].split()[:5] == ["DPO", "25", "%", "1/4", "stopped"]


def test_quiet_is_silent() -> None:
    file = io.StringIO()
    clock = Clock()
    with Progress("DPO", total=4, quiet=True, file=file, clock=clock) as progress:
        clock.now += 60
        progress.advance(4, work=9)
    assert file.getvalue() == ""


def test_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    clock, file = Clock(), Terminal()
    with Progress("DPO", total=4, file=file, clock=clock) as progress:
        clock.now += 1
        progress.advance(1, work=100, loss=0.5)
    written = file.getvalue()
    assert "\x1b[" in written
    assert "100 tokens/s" in written
    assert "loss 0.5" in written


def test_sample_page_is_inert(tmp_path: Path) -> None:
    hostile = "</pre><script>alert(1)</script>{title}"
    write_samples(tmp_path / "samples.html", [Sample(hostile, ((hostile, hostile),))], title=hostile, note=hostile)
    page = (tmp_path / "samples.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 6
    assert "http" not in page
