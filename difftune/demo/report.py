"""The demo's report: one HTML file with its pictures, curves and tables inside."""

from collections.abc import Mapping
from typing import Any

from difftune.demo.stages import Stage
from difftune.files.versions import versions
from difftune.reports import figures, pages

Facts = Mapping[str, Any]


def render(stages: Mapping[str, Stage], metrics: Facts, seed: int) -> str:
    """The report as HTML."""
    facts = {"stages": stages, "metrics": metrics, "seed": seed, "versions": versions()}
    return pages.render("demo.html.j2", curve=curve, **facts)


def curve(facts: Facts) -> bytes:
    """A line over 1, 2, ... as PNG: the stage's `y`, `x_label` and `y_label`."""
    figure, [axes] = figures.panels([facts["y_label"]], facts["x_label"])
    figures.draw(axes, range(1, len(facts["y"]) + 1), facts["y"])
    return figures.as_png(figure)
