"""Curves of one style: the mean as a line, the spread of samples as a band, what is held out in its own colour."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAIN, HELD, BEST, PALE = "#2563eb", "#d97706", "#dc2626", "#94a3b8"
DPI = 120
SPREAD = (10, 90)  # percentiles of a band


def panels(names: Sequence[str], x_label: str, width: float = 6.0, height: float = 1.8) -> tuple[Figure, list[Any]]:
    """A figure with a panel for each name, one above the other, that share the axis below."""
    made = Figure(figsize=(width, max(height * len(names), 2.6)), layout="constrained")
    axes = list(made.subplots(len(names), sharex=True, squeeze=False)[:, 0])
    for name, each in zip(names, axes, strict=True):
        each.set_ylabel(name)
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(x_label)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))  # steps, iterations and evaluations are counted
    return made, axes


def draw(axes: Any, x: Sequence[float], y: Sequence[float], color: str = MAIN, label: str | None = None) -> None:
    """A line, with dots if there are few points."""
    axes.plot(x, y, color=color, linewidth=1.8, marker="o" if len(x) < 12 else None, markersize=4, label=label)


def draw_samples(axes: Any, curves: Sequence[Sequence[float]], color: str = MAIN) -> None:
    """Curves of several samples by iteration: their mean as a line, the 10th to 90th percentile as a band.

    A sample that ended early counts as it was at its end. What takes two values alone, a verdict of yes or no, has no
    band: it would fill the panel.
    """
    length = max(map(len, curves))
    held = np.array([[*curve, *[curve[-1]] * (length - len(curve))] for curve in curves if curve])
    low, high = np.percentile(held, SPREAD, axis=0)
    if len(held) > 1 and len(np.unique(held)) > 2:
        axes.fill_between(range(length), low, high, color=color, alpha=0.18, linewidth=0)
    draw(axes, range(length), held.mean(0), color)


def shade(axes: Sequence[Any], begin: float, end: float) -> None:
    """Mark in every panel where the held-out reward no longer follows."""
    for each in axes:
        each.axvspan(begin, max(end, begin + 0.5), color=PALE, alpha=0.3, linewidth=0)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and of those up to a tenth of the run before it."""
    window = max(1, len(values) // 10)
    return [math.fsum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def as_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
