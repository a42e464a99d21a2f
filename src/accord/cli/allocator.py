"""glibc's allocator on CPU: keep big blocks instead of handing them back to the kernel at every step.

By default each large tensor is mapped and page-faulted afresh, and a training step takes 1.2 to 1.4 times as long.
glibc reads the settings once, as a process starts, so the command starts itself again with them. Memory that is kept
shows as resident. A user's own values of these variables win.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["SETTINGS", "missing_settings", "start_again"]

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""Bytes: map no block below 8 GiB, return no free memory below 16 GiB, grow the heap by 256 MiB at a time."""


def missing_settings() -> dict[str, str]:
    """The settings that this process was not started with; none away from Linux, where they mean nothing."""
    if sys.platform != "linux":
        return {}
    return {name: value for name, value in SETTINGS.items() if name not in os.environ}


def start_again(arguments: Sequence[str]) -> None:
    """Replace this process by the same command with the settings; return if it already has them."""
    missing = missing_settings()
    if missing:
        os.execve(sys.executable, [sys.executable, "-m", "accord", *arguments], {**os.environ, **missing})
