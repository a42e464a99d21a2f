"""What a run tells: metrics.jsonl (always), verdicts on its health, progress, a page of samples, trackers by name."""

from accord.tracking.health import HEALTH_FILE, RULES, Health, HealthFile, Notice
from accord.tracking.metrics import METRICS_FILE, MetricsFile, read_metrics
from accord.tracking.page import Sample, write_samples
from accord.tracking.progress import Progress
from accord.tracking.trackers import TRACKERS, TrackedRun, Tracker, TrackerKind, Tracking, require_trackers

__all__ = [
    "HEALTH_FILE",
    "METRICS_FILE",
    "RULES",
    "TRACKERS",
    "Health",
    "HealthFile",
    "MetricsFile",
    "Notice",
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
