"""Trackers by name: each row of metrics.jsonl also goes to TensorBoard, W&B, MLflow or trackio.

A tracker is a few lines over its library, which is imported only where a run names it. What a library needs to know (a
server, a key, a project) it reads from its own environment variables.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from accord.config import Config, flatten
from accord.errors import ResourceError
from accord.files import write_text
from accord.registry import Registry
from accord.tracking.health import HealthFile
from accord.tracking.metrics import MetricsFile, read_metrics

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "TrackerKind", "Tracking", "require_trackers"]

_PROJECT = "accord"
"""The project that runs go to, where the environment names none."""


class Tracker(Protocol):
    """Where the metrics of a run go beside metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step. A resumed run logs again the steps that it runs again."""

    def close(self, *, finished: bool) -> None:
        """Send what is left; `finished` is false where the run was interrupted or failed."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run.

    Example: ``TrackedRun(Path("runs/dpo"), {"seed": 0, "optimizer.learning_rate": 1e-5}, resume_step=0)``
    """

    directory: Path
    settings: Mapping[str, Any]
    """By dotted name."""
    resume_step: int
    """The run goes on behind this step."""

    @property
    def name(self) -> str:
        return self.directory.as_posix()

    def remembered(self, tracker: str, make: Callable[[], str]) -> str:
        """The tracker's own id of this run: made once, kept in ``trackers.json`` of the run directory."""
        path = self.directory / "trackers.json"
        ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if tracker not in ids:
            ids[tracker] = make()
            write_text(path, json.dumps(ids, indent=2) + "\n")
        return ids[tracker]


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """How a tracker is started, and the package that it needs (the name to import and to install)."""

    package: str
    start: Callable[[TrackedRun], Tracker]


TRACKERS: Registry[TrackerKind] = Registry("tracker", "accord.trackers")


def require_trackers(names: Iterable[str]) -> None:
    """See to it that these trackers exist and their libraries are installed.

    Raises:
        UnknownNameError: there is no tracker of this name.
        ResourceError: its library is not installed.
    """
    for name in names:
        package = TRACKERS[name].package
        if find_spec(package) is None:
            what = f"The tracker {name!r} needs the package {package}, which is not installed."
            raise ResourceError(what, where="trackers", fix=f"pip install {package}")


class Tracking:
    """All that takes the metrics of a run, as one: metrics.jsonl, the rules of its health, then the trackers named.

    A tracker that fails while the run goes on is told of and left out from there on; metrics.jsonl has everything.

    Args:
        settings: of the run; trackers show them.
        resume_step: as of `MetricsFile`.

    Raises:
        ResourceError: a tracker cannot start.
    """

    def __init__(self, run_dir: Path, settings: Config, trackers: Iterable[str] = (), *, resume_step: int) -> None:
        require_trackers(trackers)
        self._file = MetricsFile(run_dir, resume_step=resume_step)
        self._health = HealthFile(run_dir, read_metrics(run_dir))
        self._trackers: dict[str, Tracker] = {}
        run = TrackedRun(run_dir, flatten(settings.model_dump(exclude_none=True)), resume_step)
        for name in trackers:
            try:
                self._trackers[name] = TRACKERS[name].start(run)
            except Exception as error:  # a library may raise anything
                self._close(finished=False)
                fix = "Mend that, or leave the tracker out."
                raise ResourceError(f"The tracker cannot start: {error}", where=f"trackers: {name}", fix=fix) from None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one row (see `MetricsFile.log`), and print what the rules of health have to say of it."""
        self._file.log(step, metrics)
        for notice in self._health.log(step, metrics):
            print(notice, file=sys.stderr)
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, metrics)
            except Exception as error:
                del self._trackers[name]
                print(f"The tracker {name} has failed and gets no more of this run: {error}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(finished=kind is None)

    def _close(self, *, finished: bool) -> None:
        self._file.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.close(finished=finished)
            except Exception as error:
                print(f"The tracker {name} did not close properly: {error}", file=sys.stderr)


class _TensorBoard:
    """Event files in ``tensorboard/`` of the run directory: ``tensorboard --logdir runs`` shows all runs."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run.directory / "tensorboard"))
        # From this step on, TensorBoard forgets what a killed process has written.
        self._write(step=run.resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self, *, finished: bool) -> None:  # noqa: ARG002
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), **fields))
        self._writer.flush()  # what stands behind a checkpoint is not logged again


class _WandB:
    """Weights & Biases. It leaves out steps that it has already. WANDB_PROJECT, WANDB_MODE, … are its own."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=run.remembered("wandb", lambda: uuid.uuid4().hex),
            resume="allow",
            dir=str(run.directory),
            config=dict(run.settings),
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    """MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are its own."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, mlflow.MlflowClient()
        self._id = run.remembered("mlflow", lambda: self._create(mlflow, run.name))
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_batch(self._id, params=[Param(name, str(value)) for name, value in run.settings.items()])
        history = self._client.get_metric_history(self._id, "learning_rate")
        self._last = max((metric.step for metric in history), default=-1)

    def _create(self, mlflow: Any, name: str) -> str:
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        return str(self._client.create_run(experiment.experiment_id, run_name=name).info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._last:  # it would keep a repeated step twice
            now = int(time.time() * 1000)
            rows = [self._metric(name, value, now, step) for name, value in metrics.items()]
            self._client.log_batch(self._id, metrics=rows)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


class _Trackio:
    """trackio. It keeps a repeated step twice, with the same values. TRACKIO_DIR, TRACKIO_SPACE_ID, … are its own."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        name = run.remembered("trackio", lambda: f"{run.name}-{uuid.uuid4().hex[:8]}")
        self._run = trackio.init(_PROJECT, name=name, resume="allow", config=dict(run.settings), embed=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002
        self._run.finish()


TRACKERS.add("tensorboard", TrackerKind("tensorboard", _TensorBoard))
TRACKERS.add("wandb", TrackerKind("wandb", _WandB))
TRACKERS.add("mlflow", TrackerKind("mlflow", _MLflow))
TRACKERS.add("trackio", TrackerKind("trackio", _Trackio))
