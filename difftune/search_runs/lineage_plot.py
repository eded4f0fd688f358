"""A picture of a search: which samples descend from which, from pure noise at the top to clean images at the bottom."""

import io
import math
from collections.abc import Sequence

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from difftune.errors import UserError
from guidance.search.problem import Graph

DPI = 120


def picture(graph: Graph, group: int = 0) -> bytes:
    """The tree of one group as PNG; `graph` is what a search's state gives."""
    buffer = io.BytesIO()
    figure(graph, group).savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def figure(graph: Graph, group: int = 0) -> Figure:
    """Nodes coloured by value (grey where there is none), and the way to the best finished sample.

    Raises ValueError for a group without a node.
    """
    rows = (graph.groups == group).nonzero()[:, 0].tolist()
    if not rows:
        raise UserError(f"group {group} has no node to draw; the graph has {sorted(set(graph.groups.tolist()))}")
    own = {row: i for i, row in enumerate(rows)}
    parents = [own.get(parent, -1) for parent in graph.parent[rows].tolist()]
    levels, values = graph.level[rows].tolist(), graph.value[rows].tolist()
    return _drawn(list(zip(layout(parents), levels, strict=True)), parents, values, best_way(parents, levels, values))


def layout(parents: Sequence[int]) -> list[float]:
    """Where each node is across: leaves side by side, a parent in the middle of its children, and no lines that cross.

    A parent comes before its children; -1 is the parent of a root.
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
    """From the finished sample of the largest value up to its root; empty before there is one."""
    finished = [n for n, level in enumerate(levels) if level == max(levels) and not math.isnan(values[n])]
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
    axes.set(ylabel="sampler step", xticks=[], yticks=sorted({level for _, level in at}))
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return made
