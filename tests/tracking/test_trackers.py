"""Trackers by name: what they are told, across kills; what happens when a library is missing or fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord.config import Config
from accord.errors import ResourceError, UnknownNameError
from accord.tracking import TRACKERS, TrackedRun, TrackerKind, Tracking, read_metrics, require_trackers


class Settings(Config):
    seed: int = 3
    loss: dict[str, float] = {"beta": 0.5}  # noqa: RUF012


class Recorder:
    """A tracker that keeps what it is told, and fails at the steps that it is given."""

    def __init__(self, run: TrackedRun, fails: tuple[int, ...] = ()) -> None:
        self.run, self.fails = run, fails
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed: bool | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step in self.fails:
            raise ConnectionError("no route to host")
        self.rows.append((step, dict(metrics)))

    def close(self, *, finished: bool) -> None:
        self.closed = finished


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Trackers `steady` and `shaky` (which fails at step 2), and those that were started."""
    started: dict[str, Recorder] = {}

    def kind(name: str, fails: tuple[int, ...]) -> TrackerKind:
        return TrackerKind("json", lambda run: started.setdefault(name, Recorder(run, fails)))

    rows = {**TRACKERS._rows, "steady": kind("steady", ()), "shaky": kind("shaky", (2,))}
    monkeypatch.setattr(TRACKERS, "_rows", rows)
    return started


def test_a_tracker_gets_settings_and_every_row(recorders: dict[str, Recorder], tmp_path: Path) -> None:
    with Tracking(tmp_path, Settings(), ["steady"], resume_step=0) as tracking:
        tracking.log(1, {"loss": 0.5})
        tracking.log(2, {"loss": 0.25})
    told = recorders["steady"]
    assert told.run.settings == {"seed": 3, "loss.beta": 0.5}
    assert told.rows == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert told.closed is True


def test_a_tracker_learns_that_a_run_was_interrupted(recorders: dict[str, Recorder], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Tracking(tmp_path, Settings(), ["steady"], resume_step=0):
        raise KeyboardInterrupt
    assert recorders["steady"].closed is False


def test_a_tracker_that_fails_ends_neither_the_run_nor_the_others(
    recorders: dict[str, Recorder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracking(tmp_path, Settings(), ["shaky", "steady"], resume_step=0) as tracking:
        for step in (1, 2, 3):
            tracking.log(step, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [step for step, _ in recorders["steady"].rows] == [1, 2, 3]
    assert [step for step, _ in recorders["shaky"].rows] == [1]
    message = capsys.readouterr().err
    assert message.count("shaky") == 1
    assert "no route to host" in message


def test_a_tracker_that_cannot_start_is_one_message(
    recorders: dict[str, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: TrackedRun) -> Any:
        raise ValueError("no API key")

    monkeypatch.setitem(TRACKERS._rows, "locked", TrackerKind("json", refuse))
    with pytest.raises(ResourceError, match=r"trackers: locked.*no API key"):
        Tracking(tmp_path, Settings(), ["steady", "locked"], resume_step=0)
    assert recorders["steady"].closed is False


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_library_is_one_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accord.tracking.trackers.find_spec", lambda _: None)
    with pytest.raises(ResourceError, match=rf"'{name}' needs the package {name}(.|\n)*pip install {name}"):
        require_trackers([name])


def test_an_unknown_tracker_lists_those_that_there_are() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'wandb'\? Known: mlflow, tensorboard, trackio, wandb"):
        require_trackers(["wandbb"])


def test_ids_of_a_run_are_made_once(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path, {}, resume_step=0)
    assert run.remembered("wandb", lambda: "w1") == "w1"
    assert run.remembered("mlflow", lambda: "m1") == "m1"
    assert TrackedRun(tmp_path, {}, resume_step=4).remembered("wandb", lambda: "w2") == "w1"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "w1", "mlflow": "m1"}


def test_tensorboard_shows_what_metrics_jsonl_holds_after_a_kill(tmp_path: Path) -> None:
    """Killed behind step 7, gone on from the checkpoint of step 5: TensorBoard's own reader finds every step once, with
    the value of the process that went on. Values are float32 there."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    killed = Tracking(tmp_path, Settings(), ["tensorboard"], resume_step=0)
    for step in range(1, 8):
        killed.log(step, {"loss": 1 / step, "rewards/margins": -step / 3})
    with Tracking(tmp_path, Settings(), ["tensorboard"], resume_step=5) as tracking:
        for step in range(6, 10):
            tracking.log(step, {"loss": 2 / step, "rewards/margins": -step / 7})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert sorted(events.Tags()["scalars"]) == ["loss", "rewards/margins"]
    for tag in ("loss", "rewards/margins"):
        found = [(event.step, np.float32(event.value)) for event in events.Scalars(tag)]
        assert found == [(row["step"], np.float32(row[tag])) for row in rows]
