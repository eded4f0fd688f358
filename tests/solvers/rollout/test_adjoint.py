"""Continuous adjoints against torchdiffeq, the papers' recursions, autograd and closed forms."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torchdiffeq import odeint_adjoint

from solvers.denoiser import Path
from solvers.exact import Gaussian, bind
from solvers.noise import cosine, flow, grid, log_snr, noise
from solvers.rollout.adjoint import ADJOINTS, runge_kutta_adjoint
from solvers.rollout.modes import rollout
from solvers.rollout.ode import TABLEAUX, Flow, Tableau, increment, scale, tau
from solvers.samplers.catalogue import euler
from solvers.samplers.singlestep import between
from tests.support.sweeps import GRIDS, MEANS, loss_of, mixture, of_mixture, randn, rel, slope, through, vp

RULE_38 = Tableau([[], [1 / 3], [-1 / 3, 1], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8])  # torchdiffeq's rk4


def discrete(tableau, levels):
    """The gradient of the sampler that `adjoint:` runs, by autograd through it."""

    def run(predict, x):
        w, field = x / scale(levels[0]), Flow(predict, "test")
        for now, then in pairwise(levels):
            w = w + increment(TABLEAUX[tableau], field, w, now, then)
        return w * scale(levels[-1])

    return of_mixture(run)


class Field(nn.Module):
    """A vector field for torchdiffeq, which must be a module and must list its parameters."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, y):
        return self.field(t, y)


def by_torchdiffeq(method, times, field, start, end):
    """of_mixture of odeint_adjoint: y_0 = start(x), dy / dt = field(predict)(t, y), x_N = end(y_N)."""

    def run(predict, x):
        means = tuple(predict.tensors)
        y = odeint_adjoint(Field(field(predict)), start(x), times, method=method, adjoint_params=means)
        return end(y[-1])

    return of_mixture(run)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"), ("rk4_38", "rk4")]
)
@pytest.mark.parametrize("start", [0.0, 0.1])
def test_stored_trajectories_are_torchdiffeqs(monkeypatch, ours, theirs, start):
    """dw / dtau = u on the grid, decreasing from alpha = 0 too."""
    monkeypatch.setitem(TABLEAUX, "rk4_38", RULE_38)
    monkeypatch.setitem(ADJOINTS, ours, runge_kutta_adjoint(ours))
    levels = grid(flow, 7, 1.0 - start)
    field = lambda predict: lambda t, w: Flow(predict, "test")(w, noise(1 - t, t))  # noqa: E731
    times = torch.stack([tau(at) for at in levels])
    found = through(f"adjoint:{ours}", levels)
    for a, b in zip(found, by_torchdiffeq(theirs, times, field, lambda x: x, lambda w: w), strict=True):
        assert rel(a, b) <= 1e-10


def in_rho(levels):
    times = torch.stack([at.sigma / at.alpha for at in levels])
    field = lambda predict: lambda t, y: predict(Path(y), noise(1.0, t)).eps  # noqa: E731
    return times, field, lambda x: x / levels[0].alpha, lambda y: y * levels[-1].alpha


def test_deis_1_is_torchdiffeqs_euler_in_rho():
    """T9: AdjointDPM's Euler is AdjointDEIS-1."""
    levels = vp(30)
    for a, b in zip(through("adjoint:deis-1", levels), by_torchdiffeq("euler", *in_rho(levels)), strict=True):
        assert rel(a, b) <= 1e-10


def recursion(levels, order, endpoint=1):
    """AdjointDEIS as the paper writes it, in x; endpoint 0 takes each Jacobian at the start of its step."""
    means, states = MEANS.clone().requires_grad_(), [randn(6, 2)]
    predict = mixture(means)
    for now, then in pairwise(levels):
        states.append(euler(predict, Path(states[-1]), now, then).x.detach())
    end = states[-1].requires_grad_()
    (a,), total, before = torch.autograd.grad(loss_of(end), end), torch.zeros_like(means), None
    for i in reversed(range(len(levels) - 1)):
        s, t, at = levels[i], levels[i + 1], levels[i + endpoint]
        x = states[i + endpoint].detach().requires_grad_()
        v, own = torch.autograd.grad(predict(Path(x), at).eps, (x, means), a * t.alpha / at.alpha)
        first = s.alpha * t.sigma / t.alpha - s.sigma  # sigma_s (e^h - 1)
        move, move_own = first * (at.alpha / s.alpha) ** 2 * v, first * at.alpha / s.alpha * own
        if before is not None and order == 2:
            r, (w, other) = levels[i + 2], before
            half = first / 2 * (log_snr(s) - log_snr(t)) / (log_snr(t) - log_snr(r))
            move = move + half * ((t.alpha / s.alpha) ** 2 * v - (r.alpha / s.alpha) ** 2 * w)
            move_own = move_own + half * (t.alpha / s.alpha * own - r.alpha / s.alpha * other)
        a, total, before = t.alpha / s.alpha * a + move, total + move_own, (v, own)
    return a, total


@pytest.mark.parametrize(("mode", "order"), [("deis-1", 1), ("deis-2m", 2)])
@pytest.mark.parametrize("levels", [vp(30), grid(cosine, 12, 0.95)], ids=["vp", "to data"])
def test_adjoint_deis_is_the_papers_recursion(mode, order, levels):
    _, *ours = through(f"adjoint:{mode}", levels)
    assert all(rel(a, b) <= 1e-10 for a, b in zip(ours, recursion(levels, order), strict=True))


def test_the_jacobian_at_the_start_makes_it_exact():
    levels = vp(30)
    end, *full = through("full", levels, euler)
    assert all(rel(a, b) <= 1e-12 for a, b in zip(recursion(levels, 1, endpoint=0), full, strict=True))
    exact_end, *exact = through("adjoint:exact_endpoint", levels)
    assert torch.equal(exact_end, end) and all(rel(a, b) <= 1e-12 for a, b in zip(exact, full, strict=True))


@pytest.mark.parametrize("tableau", ["midpoint", "heun", "rk4"])
def test_reversed_stages_are_the_gradient_of_the_sampler(tableau):
    """T10, the symplectic adjoint without divisions (https://arxiv.org/abs/2102.09750): what "discrete" stands for."""
    (a, b), levels = TABLEAUX[tableau], grid(cosine, 8)
    means, x = MEANS.clone().requires_grad_(), randn(6, 2)
    field, total = Flow(mixture(means), "test"), torch.zeros_like(means)
    states = [x / scale(levels[0])]
    for now, then in pairwise(levels):
        states.append((states[-1] + increment(TABLEAUX[tableau], field, states[-1], now, then)).detach())
    end = (states[-1] * scale(levels[-1])).requires_grad_()
    q = torch.autograd.grad(loss_of(end), end)[0] * scale(levels[-1])
    for w, (now, then) in reversed(list(zip(states, pairwise(levels), strict=False))):
        h, stages, slopes, pulls = tau(then) - tau(now), [], [], {}
        for row, c in zip(a, TABLEAUX[tableau].c, strict=True):
            stages.append((w + h * sum(k * u for k, u in zip(row, slopes, strict=True))).detach().requires_grad_())
            slopes.append(field(stages[-1], between(now, then, c)))
        for i in reversed(range(len(b))):
            cotangent = h * b[i] * q + h * sum(a[j][i] * pulls[j] for j in range(i + 1, len(b)))
            pulls[i], own = torch.autograd.grad(slopes[i], (stages[i], means), cotangent, retain_graph=True)
            total = total + own
        q = q + sum(pulls.values())
    _, for_x, for_means = discrete(tableau, levels)
    assert rel(q / scale(levels[0]), for_x) <= 1e-12 and rel(total, for_means) <= 1e-12


def gaps(mode, levels_of, steps, tableau=None):
    """How far (gradients for x and the means) an adjoint is from the gradient of the sampler that it runs."""
    rows = []
    for n in steps:
        levels = levels_of(n)
        end, *exact = discrete(tableau, levels) if tableau else through("full", levels, euler)
        ours_end, *ours = through(mode, levels)
        assert rel(ours_end, end) <= 1e-13
        rows.append([rel(a, b) for a, b in zip(ours, exact, strict=True)])
    return torch.tensor(rows).T.tolist(), torch.cosine_similarity(ours[0].flatten(), exact[0].flatten(), 0)


@pytest.mark.parametrize(
    ("tableau", "least", "most"), [("euler", 0.85, 1.15), ("midpoint", 1.7, 3.3), ("heun", 2.5, 3.5), ("rk4", 3.6, 4.6)]
)
def test_gap_to_the_discrete_gradient_closes_with_the_order(tableau, least, most):
    """T13, in tau."""
    steps = [10, 20, 40]
    for levels_of in (GRIDS["vp"], GRIDS["flow"]):
        (for_x, for_means), _ = gaps(f"adjoint:{tableau}", levels_of, steps, tableau)
        assert least <= slope(steps, for_x) <= most
        assert least <= slope(steps, for_means) <= most


def test_first_order_gap_in_rho():
    """T13: AdjointDPM's at 40 steps is 5 to 40 %."""
    (for_x, for_means), cosine_40 = gaps("adjoint:deis-1", vp, [20, 40])
    assert 0.05 < for_x[-1] < 0.4 and cosine_40 > 0.98
    assert 0.85 <= slope([20, 40], for_x) <= 1.15 and 0.85 <= slope([20, 40], for_means) <= 1.15
    (second, _), _ = gaps("adjoint:deis-2m", vp, [40])
    assert second[-1] < for_x[-1] / 2
    (in_tau, _), _ = gaps("adjoint:euler", vp, [40], "euler")
    assert in_tau[-1] < for_x[-1] / 2


def test_gaussian_closed_form():
    """T14: d y_b / d y_a = r, d y_b / d mean = 1 - r, and for the deviation, by RK4 on 80 steps."""
    levels, s = vp(80), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    mean, x = torch.tensor([0.3, -0.2]).double().requires_grad_(), randn(6, 2).requires_grad_()
    end = rollout(None, bind(Gaussian(mean, s), {}, [mean, s]), x, levels, "adjoint:rk4").x
    for_x, for_mean, for_s = torch.autograd.grad(end.sum(), (x, mean, s))
    (a, rho_a), (b, rho_b) = ((at.alpha, at.sigma / at.alpha) for at in (levels[0], levels[-1]))
    r = ((s**2 + rho_b**2) / (s**2 + rho_a**2)).sqrt()
    assert rel(for_x, torch.full_like(x, (b / a * r).item())) <= 1e-6
    assert rel(for_mean, torch.full_like(mean, (6 * b * (1 - r)).item())) <= 1e-6
    exact = b * (x / a - mean) * r * s * (1 / (s**2 + rho_b**2) - 1 / (s**2 + rho_a**2))
    assert rel(for_s, exact.sum()) <= 1e-6


def test_deis_at_alpha_zero_is_refused():
    for mode in ("deis-1", "deis-2m"):
        with pytest.raises(ValueError, match=f"'adjoint:{mode}' divides by alpha.*'adjoint:heun'"):
            rollout(None, mixture(), randn(3, 2), grid(flow, 4), f"adjoint:{mode}")
