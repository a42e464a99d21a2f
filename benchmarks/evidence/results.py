"""How evidence is told: the last line, the file in `baselines/`, and curves in `docs/images`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
_POINTS = 120
"""Of a curve, at most: more make the file large and nothing clearer."""
sys.path.insert(0, str(ROOT / "benchmarks"))

from offline_report import baseline, circumstances  # noqa: E402


def conclude(name: str, result: Mapping[str, Any], *, write: bool) -> None:
    """Print the result with command, machine and processor time as one line of JSON; with `write`, keep it.

    Args:
        name: of the script, without its ending.
    """
    times = os.times()
    seconds = times.user + times.system + times.children_user + times.children_system
    whole = {**result, "processor seconds": round(seconds), **circumstances(f"evidence/{name}.py")}
    if write:
        path = baseline(ROOT / "benchmarks" / "baselines", f"evidence-{name}")
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(whole))


def smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """Means over the last values, NaN aside."""
    parts = (np.array(values[max(0, end - window) : end]) for end in range(1, len(values) + 1))
    return [float(part[~np.isnan(part)].mean()) if not np.isnan(part).all() else float("nan") for part in parts]


def draw(
    name: str,
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    *,
    across: str = "step",
    places: Sequence[float] = (),
) -> None:
    """One panel for each quantity, one line for each series, the mean of its seeds in their band: docs/images/NAME.svg.

    Args:
        panels: for each quantity and series, the values of every seed.
        places: where the points of all series stand (default: 1, 2, 3, …).
    """
    plt = plotting()
    figure, row = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axes, (quantity, series) in zip(row[0], panels.items(), strict=True):
        for label, seeds in series.items():
            values = np.array(seeds)
            some = slice(None, None, 1 + values.shape[1] // _POINTS)
            values, across_P = values[:, some], (places or range(1, values.shape[1] + 1))[some]
            (line,) = axes.plot(across_P, values.mean(0), label=label, linewidth=1.2)
            axes.fill_between(across_P, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel=across, ylabel=quantity)
    row[0][0].legend(frameon=False, fontsize=8)
    save(figure, name)


def plotting() -> Any:
    """pyplot without a screen; the same curves give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accord"  # else names in the file would be random
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, name: str) -> None:
    """Write docs/images/NAME.svg."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
