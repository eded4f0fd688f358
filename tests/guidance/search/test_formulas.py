"""Single terms of the searches' formulas, each against numbers worked out by hand."""

from math import log, sqrt

import pytest
import torch

from guidance.search.problem import Problem
from guidance.search.tds import TDS, tds, tempered
from guidance.search.tree import ROOT, Rule, uct
from solvers.exact import Gaussian, bind
from solvers.noise import cosine, grid


class Visited:
    """Three children of a root that was visited 9 times."""

    visits = (9, 4, 4, 1)
    values = (0.0, 0.0, 0.1, 0.0)

    def valued(self, node):
        return [1, 2, 3]


def test_uct_is_the_value_and_c_sqrt_log_n_by_the_visits():
    """v + c sqrt(log N / n): the child that was visited once overtakes at the c where the bounds meet."""
    gain = sqrt(log(9) / 1) - sqrt(log(9) / 4)
    meets = 0.1 / gain
    for c, picked in ((0.99 * meets, 2), (1.01 * meets, 3)):
        assert uct(Visited(), ROOT, Rule("uct", 1.0, 1.0, 1.0, exploration=c), 0.5) == picked


@pytest.mark.parametrize("tempering", (None, 0.3))
def test_a_proposal_is_moved_by_the_temperature_of_the_level_it_goes_to(monkeypatch, tempering):
    """Mean + std^2 lambda_{i+1} grad r: on x0 of a Gaussian and r = sum x0, the gradient is that of the denoiser."""
    levels, base = grid(cosine, 4, start=0.95, stop=0.1), Gaussian(torch.zeros(2, dtype=torch.float64), 0.7)
    problem = Problem(levels, lambda groups: bind(base, {}), lambda x0, groups: x0.sum(1), (2,), dtype=torch.float64)
    config = TDS(particles=3, inverse_temperature=1.5, tempering=tempering, threshold=None)
    moved, stock = [], Problem.move

    def move(self, path, said, i, noise):
        moved.append((i, noise))
        return stock(self, path, said, i, noise)

    monkeypatch.setattr(Problem, "move", move)
    monkeypatch.setattr("guidance.search.tds.noises", lambda *args: torch.zeros(3, 2, dtype=torch.float64))
    list(tds(problem, config))
    assert [i for i, _ in moved] == [0, 1, 2, 3]
    for i, drift in moved:
        at = levels[i]
        slope = at.alpha * 0.49 / (at.alpha**2 * 0.49 + at.sigma**2)  # d x0 / d x
        std = problem.kernel(base(torch.zeros(3, 2, dtype=torch.float64), at, {}), i)[1]
        expected = std * tempered(config, i + 1) * slope if i < 3 else torch.zeros(())
        torch.testing.assert_close(drift, expected.to(drift).expand_as(drift))
