"""The picture of a search: a layout whose lines do not cross, and the way to the best sample."""

import io
import math
import random
from itertools import pairwise

import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.offsetbox import AnnotationBbox
from PIL import Image

from difftune.search_runs.lineage_plot import best_way, figure, layout, picture, shown_leaves
from guidance.search.problem import Graph

#        0       1
#      2   3     4      and another group: 6 above 7
#            5
PARENTS = [-1, -1, 0, 0, 1, 3, -1, 6]
LEVELS = [0, 0, 5, 5, 5, 10, 0, 5]
VALUES = [0.1, 0.2, math.nan, 0.4, 0.9, 0.3, 0.5, 0.6]
GRAPH = Graph(
    *map(torch.tensor, (PARENTS, LEVELS, [0] * 6 + [1] * 2)),
    torch.tensor(VALUES),
)


def test_leaves_lie_side_by_side_and_parents_in_the_middle():
    assert layout(PARENTS[:6]) == [0.5, 2.0, 0.0, 1.0, 2.0, 1.0]


def test_no_lines_cross():
    rng = random.Random(0)
    parents = [-1, -1] + [rng.randrange(n) for n in range(2, 80)]
    places, depths = layout(parents), [0] * 80
    for n, parent in enumerate(parents):
        depths[n] = 0 if parent < 0 else depths[parent] + 1
    for depth in range(1, max(depths) + 1):
        row = sorted((n for n in range(80) if depths[n] == depth), key=places.__getitem__)
        assert all(places[a] < places[b] and places[parents[a]] <= places[parents[b]] for a, b in pairwise(row))


def test_best_way_starts_at_the_best_finished_sample():
    assert best_way(PARENTS[:6], LEVELS[:6], VALUES[:6]) == [5, 3, 0]  # .9 at node 4 is an estimate part-way
    assert best_way([-1], [0], [math.nan]) == []


def test_figure_has_an_edge_for_each_child_and_a_dot_for_each_node():
    axes = figure(GRAPH, 0).axes[0]
    [edges] = [c for c in axes.collections if isinstance(c, LineCollection)]
    everything, known = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert len(edges.get_segments()) == 4
    assert len(everything.get_offsets()) == 6 and len(known.get_offsets()) == 5
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 10], [1.0, 5], [0.5, 0]]
    assert len(figure(GRAPH, 1).axes[0].collections[1].get_offsets()) == 2


def test_picture_is_a_png():
    assert Image.open(io.BytesIO(picture(GRAPH))).size == (960, 540)


def test_a_group_without_nodes_is_refused():
    with pytest.raises(ValueError, match="group 2 has no node"):
        figure(GRAPH, 2)


def test_the_best_leaf_is_among_those_shown_and_they_go_from_left_to_right():
    parents = [-1, *[0] * 9]
    values = [math.nan, 0.1, 0.2, 0.9, 0.3, 0.4, 0.1, 0.2, math.nan, 0.3]
    graph = Graph(*map(torch.tensor, (parents, [0] + [5] * 9, [0] * 10)), torch.tensor(values))
    shown = shown_leaves(graph, 0, 4)
    assert list(shown) == sorted(shown) and len(shown) == 4 and 3 in shown and 8 not in shown
    assert shown[3] == 2 and shown[9] == 7  # numbers among the leaves that have a value


def test_thumbnails_stand_below_the_tree():
    axes = figure(GRAPH, 0, {5: torch.zeros(8, 8, 3).numpy()}).axes[0]
    [thumbnail] = [child for child in axes.get_children() if isinstance(child, AnnotationBbox)]
    assert thumbnail.xybox[1] > 10 and axes.get_ylim()[0] > thumbnail.xybox[1]
    assert [text.get_text() for text in axes.texts] == ["0.3"]
