"""Draws the losses of a training of the embedded models, a panel for each stage.

    python scripts/plot_curves.py DIR [--out docs/images/measured/training.svg]

DIR is the --state of scripts/train_tiny.py. Every point is a mean over 50 steps; one that was run twice, after a stop,
is drawn as it came out last.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from difftune.files.output import whole_file
from scripts.plot_measured import COLORS, FOLDER, STYLE

COLUMNS = 3


def curves(state: Path) -> dict[str, dict[int, float]]:
    """The loss by step of every stage, in the order in which they were begun."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in (state / "curves.jsonl").read_text().splitlines():
        point = json.loads(line)
        found[point["stage"]][point["step"]] = point["loss"]
    return found


def drawn(stages: dict[str, dict[int, float]]) -> Figure:
    rows = -(-len(stages) // COLUMNS)
    made = Figure(figsize=(8, 1.9 * rows), layout="constrained")
    panels = list(made.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, (stage, losses) in zip(panels, stages.items(), strict=False):
        steps = sorted(losses)
        axes.plot(steps, [losses[step] for step in steps], color=COLORS[0], linewidth=1.2)
        axes.set(title=stage, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(stages) :]:
        axes.set_axis_off()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("--out", type=Path, default=FOLDER / "training.svg")
    options = parser.parse_args()
    with rc_context(STYLE), whole_file(options.out) as file:
        drawn(curves(options.state)).savefig(file, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
