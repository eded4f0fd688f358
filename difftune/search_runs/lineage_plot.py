"""A picture of a search: which samples descend from which, from pure noise at the top to clean images at the bottom."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from difftune.errors import UserError
from difftune.reports import figures
from guidance.search.problem import Graph

THUMBNAIL = 0.62  # inches across
TICKS = 12  # at most, on the axis of levels


def picture(graph: Graph, group: int = 0, thumbnails: Mapping[int, Any] | None = None) -> bytes:
    """The tree of one group as PNG; `graph` is what a search's state gives."""
    return figures.as_png(figure(graph, group, thumbnails))


def figure(graph: Graph, group: int = 0, thumbnails: Mapping[int, Any] | None = None) -> Figure:
    """Nodes coloured by value (grey without one), and the way to the best finished sample.

    thumbnails: pictures (H, W, 3) in [0, 1] by the numbers of their nodes within the group, see `shown_leaves`; they
    stand below the tree with their values. Raises ValueError for a group without a node.
    """
    rows = (graph.groups == group).nonzero()[:, 0].tolist()
    if not rows:
        raise UserError(f"group {group} has no node to draw; the graph has {sorted(set(graph.groups.tolist()))}")
    own = {row: i for i, row in enumerate(rows)}
    parents = [own.get(parent, -1) for parent in graph.parent[rows].tolist()]
    levels, values = graph.level[rows].tolist(), graph.value[rows].tolist()
    at, way = list(zip(layout(parents), levels, strict=True)), best_way(parents, levels, values)
    made = _drawn(at, parents, values, way)
    if thumbnails:
        _add_thumbnails(made.axes[0], at, values, way[:1], thumbnails)
    return made


def leaves(levels: Sequence[int], values: Sequence[float]) -> list[int]:
    """The finished samples that have a value, in the order of the nodes."""
    return [n for n, level in enumerate(levels) if level == max(levels) and not math.isnan(values[n])]


def shown_leaves(graph: Graph, group: int, count: int) -> dict[int, int]:
    """The leaves to show, as {node within the group: its number among the group's leaves}: the best one, and others
    that are spread evenly across."""
    rows = (graph.groups == group).nonzero()[:, 0].tolist()
    own = {row: i for i, row in enumerate(rows)}
    parents = [own.get(parent, -1) for parent in graph.parent[rows].tolist()]
    levels, values = graph.level[rows].tolist(), graph.value[rows].tolist()
    every, places = leaves(levels, values), layout(parents)
    across = sorted(every, key=lambda n: places[n])
    picked = {across[i * (len(across) - 1) // max(count - 1, 1)] for i in range(min(count, len(across)))}
    best = best_way(parents, levels, values)[:1]
    if best and best[0] not in picked:
        picked.discard(min(picked, key=lambda n: abs(places[n] - places[best[0]])))
        picked.add(best[0])
    return {n: every.index(n) for n in sorted(picked, key=lambda n: places[n])}


def layout(parents: Sequence[int]) -> list[float]:
    """The horizontal place of each node: leaves stand side by side, a parent in the middle of its children.

    No lines cross. A parent comes before its children in the list; -1 is the parent of a root.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    places, waiting, leaves = [0.0] * len(parents), [n for n, p in enumerate(parents) if p < 0][::-1], 0
    while waiting:
        node = waiting.pop()
        waiting += children[node][::-1]
        if not children[node]:
            places[node], leaves = float(leaves), leaves + 1
    for node in reversed(range(len(parents))):
        if children[node]:
            places[node] = sum(places[c] for c in children[node]) / len(children[node])
    return places


def best_way(parents: Sequence[int], levels: Sequence[int], values: Sequence[float]) -> list[int]:
    """The nodes from the finished sample of the largest value up to its root; [] before a sample is finished."""
    finished = leaves(levels, values)
    way = [max(finished, key=lambda n: values[n])] if finished else []
    while way and parents[way[-1]] >= 0:
        way.append(parents[way[-1]])
    return way


def _drawn(at: Sequence[tuple[float, int]], parents: Sequence[int], values: Sequence[float], way: list[int]) -> Figure:
    made = Figure(figsize=(8, 4.5), layout="constrained")
    axes = made.subplots()
    edges = [(at[parent], at[node]) for node, parent in enumerate(parents) if parent >= 0]
    axes.add_collection(LineCollection(edges, colors="#9ca3af", linewidths=0.6, zorder=1))
    axes.plot([at[n][0] for n in way], [at[n][1] for n in way], color="#dc2626", linewidth=1.8, zorder=2)
    known = [n for n, value in enumerate(values) if not math.isnan(value)]
    size = max(2.0, min(40.0, 4000 / len(at)))
    across, down = zip(*at, strict=True)
    axes.scatter(across, down, s=size, color="#d1d5db", zorder=3)
    if known:
        x, y = zip(*(at[n] for n in known), strict=True)
        dots = axes.scatter(x, y, s=size, c=[values[n] for n in known], cmap="viridis", zorder=4)
        made.colorbar(dots, ax=axes, label="reward, and its estimate")
    steps = sorted({level for _, level in at})
    axes.set(ylabel="sampler step", xticks=[], yticks=steps[:: -(-len(steps) // TICKS)])
    axes.invert_yaxis()
    axes.spines["left"].set_bounds(steps[0], steps[-1])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return made


def _add_thumbnails(
    axes: Any,
    at: Sequence[tuple[float, int]],
    values: Sequence[float],
    best: Sequence[int],
    thumbnails: Mapping[int, Any],
) -> None:
    """Pictures in a row below the tree, each with a line to its leaf and its value; the best in red."""
    lowest, first = max(level for _, level in at), min(level for _, level in at)
    left, right = min(x for x, _ in at), max(x for x, _ in at)
    height = max(lowest - first, 1)
    for i, (node, image) in enumerate(thumbnails.items()):
        x = left + (right - left) * (i + 0.5) / len(thumbnails)
        y = lowest + 0.32 * height
        color = figures.BEST if node in best else figures.PALE
        side = OffsetImage(image, zoom=THUMBNAIL * 72 / max(image.shape[:2]), interpolation="nearest")
        frame = {"edgecolor": color, "linewidth": 2.0 if node in best else 0.8}
        axes.plot([at[node][0], x], [at[node][1], y], color=color, linewidth=0.8, zorder=1)
        axes.add_artist(AnnotationBbox(side, (x, y), pad=0.15, bboxprops=frame, zorder=5))
        axes.annotate(
            f"{values[node]:.3g}", (x, y), (0, -36), textcoords="offset points", ha="center", va="top", fontsize=8
        )
    axes.set_ylim(lowest + 0.62 * height, first - 0.06 * height)
