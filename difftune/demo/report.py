"""The demo's report: one HTML file with its pictures, curves and tables inside."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from difftune.environment import versions
from difftune.files.output import png

Facts = Mapping[str, Any]


def render(stages: Mapping[str, Facts], metrics: Facts, budget: Facts, seed: int) -> str:
    """The report as HTML; `stages` as `difftune.demo.run` makes them."""
    environment = Environment(loader=PackageLoader("difftune.demo"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"picture": picture, "curve": curve}
    template = environment.get_template("report.html.j2")
    return template.render(stages=stages, metrics=metrics, budget=budget, seed=seed, versions=versions())


def picture(image: Any) -> str:
    """A picture (H, W, 3) in [0, 1] as a data URI."""
    return _uri(png(image))


def curve(y: Sequence[float], x_label: str, y_label: str) -> str:
    """A line over 1, 2, ... as a data URI."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(y) + 1), y, color="#2563eb", marker="." if len(y) < 3 else None)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return _uri(buffer.getvalue())


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
