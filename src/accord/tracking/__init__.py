"""What a run tells: metrics.jsonl (always), a line of progress, a page of samples, and trackers by name."""

from accord.tracking.metrics import METRICS_FILE, MetricsFile, read_metrics
from accord.tracking.page import Sample, write_samples
from accord.tracking.progress import Progress
from accord.tracking.trackers import TRACKERS, TrackedRun, Tracker, TrackerKind, Tracking, require_trackers

__all__ = [
    "METRICS_FILE",
    "TRACKERS",
    "MetricsFile",
    "Progress",
    "Sample",
    "TrackedRun",
    "Tracker",
    "TrackerKind",
    "Tracking",
    "read_metrics",
    "require_trackers",
    "write_samples",
]
