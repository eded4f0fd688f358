"""The guidance bench: what it keeps and reads, and the arithmetic of its tables, without a network."""

import json
from types import SimpleNamespace

import pytest
import torch

from difftune.evaluation.intervals import estimate
from guidance.methods.catalogue import CFG, AdaptiveGuidance, RectifiedCFGpp
from solvers.noise import flow, grid
from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("bench_guidance") as module:
        yield module


def found(name: str, scale: float | None, holds: list[bool], images: int = 2, **more) -> dict:
    """A cell of a sweep, as the store has it."""
    share = sum(holds) / len(holds)
    known = {"guidance": name, "scale": scale, "holds": holds, "saturations": [0.1] * (len(holds) // images)}
    estimates = {m: {"score": share, "low": 0.0, "high": 1.0} for m in ("score", "coverage", "saturation", "diversity")}
    return known | estimates | {"steps": 11, "nfe": 22.0} | more


def test_coverage_on_a_line(bench):
    """The reach of 0, 1, ..., 7 is that of the fifth neighbour: 5 4 3 3 3 3 4 5."""
    real = torch.arange(8.0).view(2, 4, 1)
    assert bench.coverage(real, real) == [1.0, 1.0]
    assert bench.coverage(torch.full((2, 4, 1), -4.0), real) == [0.25, 0.0]  # 4 from 0, and 5 from 1, whose reach is 4
    assert bench.coverage(torch.full((2, 4, 1), 8.5), real) == [0.0, 0.5]  # 2.5 from 6, 3.5 from 5, whose reach is 3


def test_a_difference_is_paired_over_the_prompts(bench):
    cells = {
        ("apg", 3.0): found("apg", 3.0, [True, True, True, False, False, False]),
        ("cfg", 3.0): found("cfg", 3.0, [False, True, False, False, False, False]),
    }
    said = bench.less(cells, ("apg", 3.0), ("cfg", 3.0))
    assert said == str(estimate([0.5, 0.5, 0.0], (-1.0, 1.0))) and said.startswith("0.333 [")
    assert bench.less(cells, ("apg", 3.0), ("cfg", 10.0)) == bench.less(cells, ("ag", 3.0), ("cfg", 3.0)) == "-"


@pytest.mark.parametrize(
    ("cost", "steps"),
    [
        (lambda n: 2 * n, 11),  # CFG
        (lambda n: n, 22),
        (lambda n: 3 * n - 2, 8),  # Rectified-CFG++
        (lambda n: 2 * (n - 1), 12),  # CFG-Zero*
        (lambda n: n + min(n, 4.3), 18),  # AG that settles after 4.3 steps
        (lambda n: 100, 11),  # never
    ],
)
def test_the_steps_are_those_that_come_closest_to_the_evaluations(bench, cost, steps):
    assert bench.closest(cost, 22) == steps


def test_a_cost_that_depends_on_the_picture_is_tried_on_prompts_from_all_over(bench):
    prompts = [str(i) for i in range(2 * bench.PILOTS)]
    assert bench.pilots_of(AdaptiveGuidance(), prompts) == prompts[::2]
    assert bench.pilots_of(AdaptiveGuidance(), prompts[:3]) == prompts[:3] and bench.pilots_of(CFG(), prompts) == ["0"]


@pytest.fixture
def stored(bench, monkeypatch, tmp_path):
    """A store of two methods at two scales on both lists, and results of other weights and of other prompts."""
    monkeypatch.setattr(bench, "weights", lambda model: "now")
    size = bench.Size(scales=(3.0, 10.0), evaluations=22, images=2, prompts=1)
    entries = {kind: [{"prompt": f"{kind} {i}"} for i in range(3)] for kind in bench.KINDS}
    monkeypatch.setattr(bench, "entries_of", lambda kind, size: entries[kind])
    lines = []

    def add(kind, *cell):
        lines.append({"key": bench.label_of(kind, *cell[:2], size), **found(*cell)})

    for kind in bench.KINDS:
        add(kind, "fbg", 10.0, [True] * 3 + [False] * 3)
        add(kind, "cfg", 10.0, [False] * 6)
        add(kind, "cfg", 3.0, [True] * 4 + [False] * 2)
        add(kind, "none", None, [True] + [False] * 5)
    add("shapeeval", "fbg", 3.0, [True] * 6)
    monkeypatch.setattr(bench, "weights", lambda model: "older")
    add("shapeeval", "apg", 3.0, [True] * 6)
    monkeypatch.setattr(bench, "weights", lambda model: "now")
    right, entries["shapeeval"] = entries["shapeeval"], [{"prompt": "another"}]
    add("shapeeval", "ag", 3.0, [True] * 6)
    entries["shapeeval"] = right
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path, size


def test_cells_are_those_of_the_size_the_prompts_and_the_weights(bench, stored):
    keys = [("none", None), ("cfg", 3.0), ("cfg", 10.0), ("fbg", 10.0)]
    assert list(bench.cells_of(*stored[:1], "shapeeval-hard", stored[1])) == keys
    assert list(bench.cells_of(*stored[:1], "shapeeval", stored[1])) == [*keys[:3], ("fbg", 3.0), keys[3]]
    assert not bench.cells_of(*stored[:1], "shapeeval", stored[1]._replace(images=3))


def test_the_table_compares_at_the_same_scale_and_at_the_best(bench, stored, capsys, monkeypatch):
    monkeypatch.setattr(bench, "print_strengths", lambda found, size: None)
    bench.print_table(*stored)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| none | - | 11 | 22.0 | 0.167 [0.000, 1.000] | 0.167 ")
    of_fbg = [line.split(" | ") for line in lines if line.startswith("| fbg")]
    scores, (same, high), (best,) = of_fbg[:2], of_fbg[2:4], of_fbg[4:]
    assert [row[1] for row in scores] == ["3", "10"] and scores[0][5] == "-"  # hard at 3 was not measured
    assert same[2].startswith("0.333 [") and same[3] == "- |" and high[2].startswith("0.500 [")
    assert best[1] == "3" and best[2].startswith("1.000") and best[3].startswith("0.333 [")
    assert best[4] == "10" and best[5].startswith("0.500") and best[6].startswith("-0.167 [")
    assert [line for line in lines if line.startswith("| cfg")][-1].count(" | - ") == 2  # nothing to compare it with


def test_rectified_cfgpp_is_beside_cfg_of_its_own_strength(bench, capsys, monkeypatch):
    """CFG of 9 is closer than that of 3 to Rectified-CFG++ of s = 9 in eight steps, which ends at 8.64."""
    levels = grid(flow, 8)
    assert bench.strength(CFG(9.0), levels) == pytest.approx(9.0)
    assert bench.strength(RectifiedCFGpp(9.0), levels) == pytest.approx(8.64, abs=5e-3)
    monkeypatch.setattr(bench, "_pipe", lambda size: None)
    monkeypatch.setattr(bench, "LatentModel", lambda pipe: SimpleNamespace(levels=lambda steps: grid(flow, steps)))
    holds = {("cfg", 3.0): [True] * 4, ("cfg", 9.0): [False] * 4, ("cfg", 10.0): [True] * 4}
    holds["rectified-cfgpp", 10.0] = [True, True, False, False]
    cells = {key: found(*key, given, steps=8) for key, given in holds.items()}
    bench.print_strengths({"ShapeEval": cells, "ShapeEval-hard": {}}, bench.Size())
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| 10 | 8 | 8.64 | 9 | 0.500 [") and line.endswith("] | - |")


@pytest.mark.slow
def test_small_settings_run(bench, tmp_path):
    size = bench.QUICK._replace(model="tiny-flow")
    bench.sweep(tmp_path, size, "shapeeval", ("none", "cfg", "ag"))
    cells = bench.cells_of(tmp_path, "shapeeval", size)
    assert [key for key in cells] == [("none", None), ("cfg", 2.0), ("ag", 2.0)]
    assert cells["none", None]["nfe"] == cells["cfg", 2.0]["nfe"] == size.evaluations
    for kind in ("shapeeval-hard", "classes"):
        bench.sweep(tmp_path, size, kind, ("cfg",))
        assert list(bench.cells_of(tmp_path, kind, size)) == [("cfg", 2.0)]
    assert set(bench.overhead(size, 1)["ratio"]) == {"attached", "own"}
