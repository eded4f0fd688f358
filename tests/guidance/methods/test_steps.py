"""Every method at few and at many steps: nothing is written for one number of them."""

import pytest
import torch

from guidance.methods.catalogue import GUIDANCE
from solvers.noise import cosine, flow, grid
from solvers.samplers.catalogue import euler, sample
from tests.support.toy import B, example, predict, start

DEAREST = {"cfg-mp": 8}  # evaluations a step


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.sampled(3)
def test_every_method_at_any_number_of_steps(name):
    """Finite at each step down to data, with what it may cost; a flow from pure noise, and a VP run."""
    for steps in (1, 2, 3, 100, 250):
        for schedule, begin in ((flow, 1.0), (cosine, 0.98)):
            levels = grid(schedule, steps, start=begin)
            bound = predict(example(name, levels))
            paths = list(sample(euler, bound, start(), levels))
            assert len(paths) == steps and all(bool(path.x.isfinite().all()) for path in paths)
            assert B * steps <= bound.counter.rows <= DEAREST.get(name, 3) * B * steps
            torch.testing.assert_close(paths[-1].x, paths[-1].x0, rtol=1e-12, atol=1e-12)
