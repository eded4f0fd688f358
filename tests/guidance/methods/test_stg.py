"""STG as PAG and SLG with a rescaled prediction, and intervals that are given in steps."""

import math
import re
from pathlib import Path

import pytest
import torch

from guidance.methods.catalogue import APG, CFG, PAG, SLG, STG, Interval, Plain
from guidance.methods.scales import ratio
from solvers.noise import cosine, flow, grid
from solvers.samplers.catalogue import euler, sample
from tests.support.toy import LEVELS, B, predict, said, same, start

PAGE = Path(__file__).parents[3] / "docs" / "guidance" / "interval.md"


@pytest.mark.parametrize("at", LEVELS.values(), ids=LEVELS)
def test_stg_is_pag_or_slg(at):
    for skip, kind in (("attention", PAG), ("blocks", SLG)):
        same(said(STG(1.5, skip=skip), at), said(kind(1.5), at))
        same(said(STG(1.5, 4.0, skip=skip), at), said(kind(1.5, cfg_scale=4.0), at))
    same(said(STG(0.0, 3.0), at), said(CFG(3.0), at), 1e-11)


def test_stg_rescaled():
    """The factor r std(c) / std(out) + 1 - r, per sample, of the flow's velocity, which the toy emits."""
    at = LEVELS["flow"]
    plain, free = (said(method, at) for method in (Plain(), STG(2.0)))
    c, out = plain.eps - plain.x0, free.eps - free.x0
    std = lambda x: x.flatten(1).std(1).view(B, 1, 1, 1)  # noqa: E731
    for share in (0.7, 1.0):
        ours = said(STG(2.0, rescale=share), at)
        torch.testing.assert_close(ours.eps - ours.x0, out * (share * std(c) / std(out) + 1 - share))


@pytest.mark.parametrize("schedule", (flow, cosine))
@pytest.mark.parametrize(
    ("start_at", "stop_at"), [(0.0, 1.0), (0.0, 0.5), (0.3, 0.7), (0.25, 0.25), (0.9, 1.0), (0.0, 0.05)]
)
def test_interval_of_steps(schedule, start_at, stop_at):
    """int(start N) <= i < int(stop N), as diffusers counts them."""
    levels = grid(schedule, 10)
    bound = predict(Interval.of_steps(levels, start_at, stop_at, CFG(3.0)))
    list(sample(euler, bound, start(), levels))
    inside = [i for i in range(10) if int(start_at * 10) <= i < int(stop_at * 10)]
    assert bound.branches.get("uncond", 0) == B * len(inside)
    held = Interval.of_steps(levels, start_at, stop_at)
    assert steps_inside(held, levels) == inside
    assert isinstance(Interval.of_steps(levels, method=APG(8.0)).method, APG)


def test_interval_of_steps_that_are_none():
    with pytest.raises(ValueError, match="steps from 0.7 to 0.3 of a run: give 0 <= start <= stop <= 1"):
        Interval.of_steps(grid(flow, 4), 0.7, 0.3)
    with pytest.raises(ValueError, match="steps from 2 to 5 of a run of 4: give 0 <= first <= end <= 4"):
        Interval.between_steps(grid(flow, 4), 2, 5)


def steps_inside(held: Interval, levels) -> list[int]:
    return [i for i, at in enumerate(levels[:-1]) if held.low < ratio(at) <= held.high]


RULES = {  # whether a step is guided, of rows of docs/guidance/interval.md
    "diffusers' guiders": lambda i, N: int(0.3 * N) <= i < int(0.8 * N),
    "Lumina2's": lambda i, N: (i + 1) / N <= 0.58,
    "SD3's": lambda i, N: N * 0.01 < i < N * 0.2,
}
GIVEN = {"Interval": Interval, "math": math, "start": 0.3, "stop": 0.8, "r": 0.58}


@pytest.mark.parametrize("where", RULES)
def test_the_pages_conversions_hold_at_any_number_of_steps(where):
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {where}"))
    code = re.findall("`(Interval[^`]*)`", row)[0]
    for steps in range(1, 101):
        levels = grid(flow, steps)
        held = eval(code, {**GIVEN, "levels": levels, "N": steps})
        assert steps_inside(held, levels) == [i for i in range(steps) if RULES[where](i, steps)], steps
