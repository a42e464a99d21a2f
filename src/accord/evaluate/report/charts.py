"""Small charts as inline SVG: no file, no network, colours from the page's own style sheet.

Matplotlib draws with placeholder colours, which then become CSS variables, so a chart follows light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import count

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from accord.stats.calibration import Calibration

__all__ = ["Charts"]

_COLOURS = {"#010101": "ink", "#010102": "muted", "#010103": "line", "#010104": "before", "#010105": "after"}
_INK, _MUTED, _LINE, _BEFORE, _AFTER = _COLOURS
_INCHES = (3.5, 2.0)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "accord",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


class Charts:
    """Draws the charts of one page; element ids are unique within it."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def curve(self, steps: Sequence[float], values: Sequence[float], label: str) -> Markup:
        """A metric over training steps: the raw values thin, their running mean thick."""
        with rc_context(_STYLE):
            figure, axes = _axes("step")
            window = max(1, len(values) // 12)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid") if values else values
            if window > 1:
                axes.plot(steps, values, color=_AFTER, linewidth=0.8, alpha=0.35)
            marker = "o" if len(values) == 1 else ""
            axes.plot(steps[window - 1 :], smooth, color=_AFTER, linewidth=1.8, marker=marker, solid_capstyle="round")
            return self._svg(figure, f"{label} over training steps")

    def distributions(self, before: Sequence[float], after: Sequence[float], label: str) -> Markup:
        """Two histograms on the same bins: baseline filled, candidate as a line."""
        with rc_context(_STYLE):
            figure, axes = _axes(label)
            edges = _edges([*before, *after])
            axes.hist(before, edges, color=_BEFORE, alpha=0.45, linewidth=0)
            axes.hist(after, edges, color=_AFTER, histtype="step", linewidth=1.8)
            return self._svg(figure, f"Distribution of {label} before and after, prompts per bin")

    def distribution(self, values: Sequence[float], label: str) -> Markup:
        """One histogram."""
        with rc_context(_STYLE):
            figure, axes = _axes(label)
            axes.hist(values, _edges(values), color=_AFTER, alpha=0.6, linewidth=0)
            return self._svg(figure, f"Distribution of {label}, prompts per bin")

    def reliability(self, calibration: Calibration) -> Markup:
        """Observed against predicted probability by bin, with intervals; on the diagonal a model is calibrated."""
        with rc_context(_STYLE):
            figure, axes = _axes("predicted")
            axes.plot([0, 1], [0, 1], color=_LINE, linewidth=1)
            x = [bin.predicted for bin in calibration.bins]
            y = [bin.observed for bin in calibration.bins]
            low = [bin.observed - bin.interval.low for bin in calibration.bins]
            high = [bin.interval.high - bin.observed for bin in calibration.bins]
            axes.errorbar(x, y, yerr=[low, high], color=_AFTER, fmt="o", markersize=4, linewidth=1.4)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.set_ylabel("observed")
            return self._svg(figure, "Reliability diagram: observed against predicted probability")

    def _svg(self, figure: Figure, description: str) -> Markup:
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"])
        )
        svg = buffer.getvalue()
        head, body = svg[svg.index("<svg") :].split(">", 1)
        head = re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", head)
        svg = f"{head}>" + re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        # Twice the same id on a page would let one chart borrow the clip path of another.
        prefix = f"c{next(self._numbers)}-"
        svg = re.sub(r'\bid="', f'id="{prefix}', svg)
        svg = re.sub(r'href="#', f'href="#{prefix}', svg)
        svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
        for colour, name in _COLOURS.items():
            svg = svg.replace(colour, f"var(--{name})")
        svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
        return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(description)}"', 1))


def _axes(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=label in ("step", "tokens")))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)
    return figure, axes


def _edges(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = min(24, max(6, round(len(values) ** 0.5)))
    return [float(edge) for edge in np.linspace(low, high, bins + 1)]
