"""Draws the tables of the measured pages as SVG, whose letters can be read on a light page and on a dark one.

    python scripts/plot_measured.py

The tables are the source: a plot shows what its page says. Files go to docs/images/measured.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "images" / "measured"
INK = "#808890"  # on white and on black alike
STYLE = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}
STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "difftune", "font.size": 10, "axes.grid": True, "grid.alpha": 0.25}
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#a16207", "#ec4899", "#84cc16", "#64748b")
MARKERS = "osD^vPX<*"
NUMBER = r"[+-]?\d*\.\d+|[+-]?\d+"
Rows = list[dict[str, str]]


def table(page: str, *columns: str) -> Rows:
    """The first table of docs/PAGE that has these columns, its rows by them. ValueError where there is none."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    for i, line in enumerate(lines):
        names = cells(line)
        if set(columns) <= set(names):
            rows = []
            for row in lines[i + 2 :]:
                if not row.startswith("|"):
                    return rows
                rows.append(dict(zip(names, cells(row), strict=True)))
            return rows
    raise ValueError(f"docs/{page} has no table with the columns {', '.join(columns)}")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def interval(text: str) -> tuple[float, float, float]:
    """The number and the ends of its interval, of "0.708 [0.654, 0.760]"."""
    middle, low, high = map(float, re.findall(NUMBER, text)[:3])
    return middle, low, high


def guidance() -> Figure:
    """Prompts followed by CFG's scale, a line for each method, with intervals."""
    made = Figure(figsize=(7, 3.4), layout="constrained")
    axes = made.subplots()
    draw_scales(axes, table(*SOURCES["guidance"]), "ShapeEval", "ShapeEval, 50 evaluations an image")
    axes.legend(ncols=1, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return made


def flow() -> Figure:
    """The same on a flow, on prompts of up to three objects too."""
    made, rows = Figure(figsize=(9, 3.6), layout="constrained"), table(*SOURCES["flow"])
    panels = made.subplots(1, 2)
    for axes, column in zip(panels, ("ShapeEval", "ShapeEval-hard"), strict=True):
        draw_scales(axes, rows, column, f"{column}, {round(float(rows[0]['NFE']))} evaluations an image")
    known = panels[0].get_legend_handles_labels()
    panels[1].legend(*known, ncols=1, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return made


def draw_scales(axes: Any, rows: Rows, column: str, label: str) -> None:
    """A column by CFG's scale: a line with intervals for each method, dashed for one without a scale."""
    rows = [row for row in rows if row[column] != "-"]
    names = list(dict.fromkeys(row["method"] for row in rows if row["scale"] != "-"))
    for shift, (name, color, marker) in enumerate(zip(names, COLORS, MARKERS, strict=False)):
        own = [row for row in rows if row["method"] == name]
        y = [interval(row[column]) for row in own]
        x = [float(row["scale"]) * 1.012**shift for row in own]  # side by side, so that intervals can be told apart
        spread = [[m - low for m, low, _ in y], [high - m for m, _, high in y]]
        axes.errorbar(x, [m for m, *_ in y], spread, marker=marker, markersize=4, capsize=2, color=color, label=name)
    for row in rows:
        if row["scale"] == "-":
            axes.axhline(interval(row[column])[0], color=INK, linestyle="--", linewidth=1, label=row["method"])
    axes.set_xscale("log", base=2)
    scales = sorted({float(row["scale"]) for row in rows if row["scale"] != "-"})
    axes.set(xlabel="CFG's scale", ylabel=label, xticks=scales)
    axes.set_xticklabels([f"{scale:g}" for scale in scales])
    axes.minorticks_off()


def recipes() -> Figure:
    """What each recipe gains in the reward that it trains on, and in the oracle, with intervals."""
    rows = table(*SOURCES["recipes"])
    labels = [f"{row['recipe'].strip(' *')} ({row['reward']})" for row in rows]
    made = Figure(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    panels = made.subplots(1, 2, sharey=True)
    for axes, column, color in zip(panels, ("difference", "difference of the oracle"), COLORS, strict=False):
        found = [interval(row[column]) for row in rows]
        spread = [[m - low for m, low, _ in found], [high - m for m, _, high in found]]
        axes.errorbar(
            [m for m, *_ in found], range(len(rows)), xerr=spread, fmt="o", markersize=4, capsize=2, color=color
        )
        axes.axvline(0, color=INK, linewidth=1)
    panels[0].set(yticks=range(len(rows)), yticklabels=labels, xlabel="gain in the trained reward")
    panels[0].invert_yaxis()
    panels[1].set(xlabel="gain in the oracle, held out")
    return made


def curves() -> Figure:
    """What ShapeEval of held-out prompts gains with what was spent, a line for each recipe, with intervals."""
    rows = table(*SOURCES["curves"])
    made = Figure(figsize=(9, 3.4), layout="constrained")
    panels = made.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("forward-equivalents", "seconds"), strict=True):
        for name, color, marker in zip(dict.fromkeys(row["recipe"] for row in rows), COLORS, MARKERS, strict=False):
            own = [row for row in rows if row["recipe"] == name]
            found = [(0.0, 0.0, 0.0), *(interval(row["to the start"]) for row in own)]
            spread = [[m - low for m, low, _ in found], [high - m for m, _, high in found]]
            x, y = [0.0, *(float(row[column]) for row in own)], [m for m, *_ in found]
            axes.errorbar(x, y, spread, marker=marker, markersize=4, capsize=2, linewidth=1.2, color=color, label=name)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set(xlabel=column)
    panels[0].set(ylabel="gain in ShapeEval, held-out prompts")
    known = panels[0].get_legend_handles_labels()
    panels[1].legend(*known, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return made


def searches() -> Figure:
    """The best reward so far by network evaluations."""
    rows = table(*SOURCES["searches"])
    made = Figure(figsize=(6, 2.8), layout="constrained")
    axes = made.subplots()
    for name, color in zip([name for name in rows[0] if name != "NFE"], COLORS, strict=False):
        y = [float(row[name]) for row in rows]
        axes.plot([float(row["NFE"]) for row in rows], y, marker="o", markersize=4, color=color, label=name)
    axes.set(xlabel="network evaluations", ylabel="best tiny-clip so far")
    axes.legend(frameon=False)
    return made


PLOTS = {"guidance": guidance, "flow": flow, "recipes": recipes, "curves": curves, "searches": searches}


SOURCES = {  # of each plot, its table
    "guidance": ("guidance/measured.md", "method", "scale", "ShapeEval", "Fréchet"),
    "flow": ("guidance/measured.md", "method", "scale", "NFE", "ShapeEval", "ShapeEval-hard", "coverage"),
    "recipes": ("training.md", "recipe", "reward", "difference", "difference of the oracle"),
    "curves": ("training.md", "recipe", "updates", "forward-equivalents", "seconds", "ShapeEval", "to the start"),
    "searches": ("search/trees.md", "NFE", "best-of-n", "dts-star"),
}


def digest(name: str) -> str:
    """The digest of a plot's table; the plot notes it, so that a test finds a plot older than its table."""
    return hashlib.sha256(repr(table(*SOURCES[name])).encode()).hexdigest()[:16]


def save(made: Figure, file: Path) -> None:
    """As SVG without a ground."""
    for axes in made.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(file, transparent=True, metadata={"Date": None, "Description": digest(file.stem)})


def main(names: Sequence[str] = tuple(PLOTS)) -> None:
    with rc_context(STYLE):
        for name in names:
            save(PLOTS[name](), FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
